// The vocabulary of the target that is compiled. A target is one translation unit, which includes
// its ISA header before anything else; so #pragma once is a guard for each target. A header that is
// read by itself, in an editor or by a test, sees the plain C++ of scalar.h.
#pragma once

#ifndef KT_ISA
#ifdef KT_TARGET_NAMESPACE
#error "a target includes its ISA header before anything else"
#endif
#include "isa/scalar.h"
#endif
