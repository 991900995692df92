#pragma once
#if defined(__GNUC__)
#define DILATED_API __attribute__((visibility("default")))
#else
#define DILATED_API
#endif
