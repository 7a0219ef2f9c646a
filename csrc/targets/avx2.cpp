#define KT_TARGET_NAMESPACE avx2
#include "isa/avx2.h"
#include "targets/integer_target-inl.h"
