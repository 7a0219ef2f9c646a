#define KT_TARGET_NAMESPACE avx512_vnni
#include "isa/avx512.h"
#include "targets/integer_target-inl.h"
