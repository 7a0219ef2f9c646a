#include "bindings/bindings.h"

PYBIND11_MODULE(_ext, module) {
  module.doc() = "Expert kernels of kt_kernel. Private: use kt_kernel.KTMoEWrapper.";
  kt::bind_machine(module);
  kt::bind_weights(module);
  kt::bind_layer(module);
  kt::bind_stream(module);
}
