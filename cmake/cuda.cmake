# Whether the CUDA kernels are built, for which architectures, and how.
#
# In:  DILATED_WITH_CUDA   AUTO: if torch is a CUDA build and its nvcc is found; ON: yes, or stop and say why not; OFF
#      DILATED_CUDA_ARCHS  as CMAKE_CUDA_ARCHITECTURES; empty: TORCH_CUDA_ARCH_LIST, else 80;90a-real
#      DILATED_CUDA_LINEINFO  source lines for profilers, with this machine's paths; OFF, as in wheels
#      DILATED_CUDA_CHECK  only compile the CUDA sources (target dilated_cuda), against any torch, reporting registers
# Out: DILATED_USE_CUDA, DILATED_CUDA_REASON (why not), function dilated_add_cuda
#
# A visible GPU plays no part: machines that build often have none.
set(DILATED_WITH_CUDA "AUTO" CACHE STRING "Build the CUDA kernels: AUTO, ON or OFF")
set(DILATED_CUDA_ARCHS "" CACHE STRING "CUDA architectures; empty: TORCH_CUDA_ARCH_LIST, else 80;90a-real")
option(DILATED_CUDA_LINEINFO "For profilers and sanitizers: the kernels' source lines, with the paths of this machine" OFF)
option(DILATED_CUDA_CHECK "Compile the CUDA sources to objects and stop there" OFF)
include("${CMAKE_CURRENT_LIST_DIR}/cuda_archs.cmake")

string(TOUPPER "${DILATED_WITH_CUDA}" _want)
if(NOT _want MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "DILATED_WITH_CUDA must be AUTO, ON or OFF; it is \"${DILATED_WITH_CUDA}\"")
endif()

# nvcc: CMAKE_CUDA_COMPILER or CUDACXX, which CMake reads itself, else CUDA_HOME, PATH, /usr/local/cuda.
set(_nvcc "${CMAKE_CUDA_COMPILER}$ENV{CUDACXX}")
if(NOT _nvcc)
  find_program(DILATED_NVCC nvcc HINTS ENV CUDA_HOME PATHS /usr/local/cuda PATH_SUFFIXES bin)
  if(DILATED_NVCC)
    set(_nvcc "${DILATED_NVCC}")
    set(CMAKE_CUDA_COMPILER "${DILATED_NVCC}")
  endif()
endif()

set(DILATED_CUDA_REASON "")
if(_want STREQUAL "OFF")
  set(DILATED_CUDA_REASON "DILATED_WITH_CUDA=OFF")
elseif(NOT DILATED_TORCH_CUDA)
  set(DILATED_CUDA_REASON "torch ${DILATED_TORCH_VERSION} is a build without CUDA")
elseif(NOT _nvcc)
  set(DILATED_CUDA_REASON "nvcc was not found: put it on PATH, or set CUDA_HOME or CUDACXX")
endif()

if(DILATED_CUDA_CHECK AND NOT _nvcc)
  message(FATAL_ERROR "DILATED_CUDA_CHECK=ON, but nvcc was not found: put it on PATH, or set CUDA_HOME or CUDACXX")
elseif(DILATED_CUDA_CHECK OR NOT DILATED_CUDA_REASON)
  dilated_choose_cuda_archs()
  set(CMAKE_CUDA_RUNTIME_LIBRARY Shared) # torch's: one CUDA runtime in the process
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
  if(DILATED_TORCH_CUDA MATCHES "^([0-9]+)" AND NOT CMAKE_MATCH_1 STREQUAL CUDAToolkit_VERSION_MAJOR)
    set(DILATED_CUDA_REASON
      "torch was built with CUDA ${DILATED_TORCH_CUDA}, but nvcc is of ${CUDAToolkit_VERSION}; the major versions must agree")
  endif()
endif()

if(NOT DILATED_CUDA_REASON)
  set(DILATED_USE_CUDA ON)
  cmake_host_system_information(RESULT _cores QUERY NUMBER_OF_LOGICAL_CORES)
  math(EXPR _minutes "2 + 30 / ${_cores}") # half an hour of one core, and what waits for the longest file
  message(STATUS "dilated: nvcc ${CUDAToolkit_VERSION} found: CUDA kernels for ${CMAKE_CUDA_ARCHITECTURES}, \
about ${_minutes} minutes on ${_cores} cores")
else()
  set(DILATED_USE_CUDA OFF)
  if(_want STREQUAL "ON")
    message(FATAL_ERROR "DILATED_WITH_CUDA=ON, but the CUDA kernels can't be built: ${DILATED_CUDA_REASON}")
  elseif(_want STREQUAL "AUTO" AND DILATED_TORCH_CUDA)
    message(WARNING "the CUDA kernels are not built: ${DILATED_CUDA_REASON}")
  endif()
  message(STATUS "dilated: no CUDA kernels: ${DILATED_CUDA_REASON}")
endif()

# dilated_add_cuda(<target> <part> <source>...): a part of the CUDA sources, as objects of the target where CUDA is used.
# They are libraries of their own because CMake 3.25 can't be told that CUDA sources are C++20; nvcc can.
function(dilated_add_cuda target part)
  if(NOT (DILATED_USE_CUDA OR DILATED_CUDA_CHECK))
    return()
  endif()
  set(_name ${target}_cuda_${part})
  add_library(${_name} OBJECT ${ARGN})
  target_compile_options(${_name} PRIVATE -std=c++20 $<$<AND:$<BOOL:${DILATED_CUDA_LINEINFO}>,$<COMPILE_LANGUAGE:CUDA>>:-lineinfo>)
  target_include_directories(${_name} PRIVATE
    "${PROJECT_SOURCE_DIR}/csrc" $<TARGET_PROPERTY:${target},INTERFACE_INCLUDE_DIRECTORIES>)
  target_link_libraries(${_name} PRIVATE dilated_torch CUDA::cudart)
  dilated_set_warnings(${_name})
  if(DILATED_CUDA_CHECK)
    # cmake/check_ptxas.py reads what -v reports. A CPU torch lacks one generated header, which the macro replaces.
    target_compile_options(${_name} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Xptxas=-v>)
    target_compile_definitions(${_name} PRIVATE C10_CUDA_NO_CMAKE_CONFIGURE_FILE)
    set_target_properties(${_name} PROPERTIES EXCLUDE_FROM_ALL ON)
    if(NOT TARGET ${target}_cuda)
      add_custom_target(${target}_cuda)
    endif()
    add_dependencies(${target}_cuda ${_name})
  else()
    # Architectures and kernels of a file side by side: the files are few and hold dozens of kernels.
    target_compile_options(${_name} PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:--threads=2;--split-compile=0>")
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:${_name}>)
    target_link_libraries(${target} PRIVATE CUDA::cudart
      "${DILATED_TORCH_DIR}/lib/libtorch_cuda.so" "${DILATED_TORCH_DIR}/lib/libc10_cuda.so")
  endif()
endfunction()
