#define KT_TARGET_NAMESPACE scalar
#include "isa/scalar.h"
#include "targets/integer_target-inl.h"
