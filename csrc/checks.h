// The checks that memory safety needs, repeated below the Python door in its words.
#pragma once
#include <torch/headeronly/util/Exception.h>

// VP_CHECK(ok, "gather", "rows", "be a 1-D int64 tensor", "2-D") fails with
// "gather: rows must be a 1-D int64 tensor, got 2-D".
#define VP_CHECK(condition, op, argument, rule, ...)                                       \
  do {                                                                                     \
    STD_TORCH_CHECK(condition, op, ": ", argument, " must ", rule, ", got ", __VA_ARGS__); \
  } while (false)
