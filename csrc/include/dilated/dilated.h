// Everything that a C++ program needs.
#pragma once

#include <dilated/build.h>
#include <dilated/ops.h>
#include <dilated/pattern.h>
#include <dilated/planned_patterns.h>
