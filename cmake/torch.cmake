# The torch to compile against, by its folder. find_package(Torch) is not used: for a CUDA build of torch it wants
# libraries that we don't, and it overrides the CUDA architectures.
#
# In:  DILATED_TORCH_ROOT  a torch package folder or an unpacked LibTorch; empty: the torch of Python_EXECUTABLE
# Out: DILATED_TORCH_DIR, DILATED_TORCH_VERSION (2.13.0), DILATED_TORCH_CUDA (13.0; empty for a build without CUDA),
#      target dilated_torch
set(DILATED_TORCH_ROOT "" CACHE PATH "torch package folder or LibTorch; empty: ask Python")

if(DILATED_TORCH_ROOT)
  set(DILATED_TORCH_DIR "${DILATED_TORCH_ROOT}")
else()
  set(_torch_status "no Python interpreter")
  if(Python_EXECUTABLE)
    execute_process(COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/query_torch.py"
      OUTPUT_VARIABLE DILATED_TORCH_DIR OUTPUT_STRIP_TRAILING_WHITESPACE
      ERROR_VARIABLE _torch_error ERROR_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE _torch_status)
  endif()
  if(NOT _torch_status EQUAL 0)
    message(FATAL_ERROR "PyTorch was not found (${_torch_status}: ${_torch_error}).\n"
      "The library is compiled against the PyTorch that will run it. Install that first, or set DILATED_TORCH_ROOT "
      "to a torch package folder or an unpacked LibTorch.")
  endif()
endif()

include("${CMAKE_CURRENT_LIST_DIR}/torch_version.cmake")
dilated_torch_version(DILATED_TORCH_VERSION "${DILATED_TORCH_DIR}")
if(NOT DILATED_TORCH_VERSION)
  message(FATAL_ERROR "${DILATED_TORCH_DIR} holds no headers of torch >= 2.11")
elseif(DILATED_TORCH_VERSION VERSION_LESS 2.11)
  message(FATAL_ERROR "torch ${DILATED_TORCH_VERSION} at ${DILATED_TORCH_DIR} is too old: 2.11 or newer is needed")
endif()

set(DILATED_TORCH_CUDA "")
if(EXISTS "${DILATED_TORCH_DIR}/lib/libtorch_cuda.so")
  set(DILATED_TORCH_CUDA "of unknown version") # LibTorch has no version.py
  if(EXISTS "${DILATED_TORCH_DIR}/version.py")
    file(STRINGS "${DILATED_TORCH_DIR}/version.py" _torch_cuda REGEX "^cuda")
    if(_torch_cuda MATCHES "['\"]([0-9.]+)['\"]")
      set(DILATED_TORCH_CUDA "${CMAKE_MATCH_1}")
    endif()
  endif()
endif()

# at::parallel_for is inlined from torch's headers, and runs on threads only where OpenMP is on. The compiler's libgomp
# has the soname of torch's own copy, so a process loads one of them and has one pool of threads. By flags, since
# OpenMP::OpenMP_CXX gives libgomp by its path, about which CMake then warns.
find_package(OpenMP COMPONENTS CXX)
if(NOT OpenMP_CXX_FOUND)
  message(WARNING "the compiler has no OpenMP: the CPU kernels will run on one thread")
endif()

add_library(dilated_torch INTERFACE)
target_include_directories(dilated_torch SYSTEM INTERFACE
  "${DILATED_TORCH_DIR}/include" "${DILATED_TORCH_DIR}/include/torch/csrc/api/include")
target_link_libraries(dilated_torch INTERFACE
  "${DILATED_TORCH_DIR}/lib/libtorch.so" "${DILATED_TORCH_DIR}/lib/libtorch_cpu.so" "${DILATED_TORCH_DIR}/lib/libc10.so")
target_compile_options(dilated_torch INTERFACE
  "$<$<COMPILE_LANGUAGE:CXX>:${OpenMP_CXX_FLAGS};-ffile-prefix-map=${DILATED_TORCH_DIR}=torch>")
target_link_options(dilated_torch INTERFACE ${OpenMP_CXX_FLAGS})
message(STATUS "dilated: torch ${DILATED_TORCH_VERSION} at ${DILATED_TORCH_DIR}")
