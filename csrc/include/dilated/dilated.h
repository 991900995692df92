// Everything that a C++ program needs, tensors and their functions included.
#pragma once

#include <ATen/ATen.h>
#include <dilated/build.h>
#include <dilated/ops.h>
#include <dilated/pattern.h>
#include <dilated/planned_patterns.h>
