# dilated_choose_cuda_archs(): sets CMAKE_CUDA_ARCHITECTURES from the first of DILATED_CUDA_ARCHS, itself, CUDAARCHS
# (CMake reads that one) and TORCH_CUDA_ARCH_LIST; else to 80 (code for Ampere, PTX for what is newer) and 90a-real
# (code for Hopper, which has instructions of its own).
macro(dilated_choose_cuda_archs)
  if(DILATED_CUDA_ARCHS)
    set(CMAKE_CUDA_ARCHITECTURES "${DILATED_CUDA_ARCHS}")
  elseif(DEFINED CMAKE_CUDA_ARCHITECTURES OR DEFINED ENV{CUDAARCHS})
    # as they are
  elseif("$ENV{TORCH_CUDA_ARCH_LIST}" STREQUAL "")
    set(CMAKE_CUDA_ARCHITECTURES 80 90a-real)
  else()
    dilated_translate_torch_archs(CMAKE_CUDA_ARCHITECTURES "$ENV{TORCH_CUDA_ARCH_LIST}")
  endif()
endmacro()

# "8.6 9.0a+PTX", as torch writes it, to 86-real;90a, as CMake does.
function(dilated_translate_torch_archs variable list)
  string(REGEX REPLACE "[ ,]+" ";" list "${list}")
  set(_archs "")
  foreach(_arch IN LISTS list)
    if(NOT _arch MATCHES "^([0-9]+)\\.([0-9][af]?)(\\+PTX)?$")
      message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST: \"${_arch}\" is not of the form 8.0, 9.0a or 9.0+PTX")
    endif()
    if(CMAKE_MATCH_3)
      list(APPEND _archs "${CMAKE_MATCH_1}${CMAKE_MATCH_2}")
    else()
      list(APPEND _archs "${CMAKE_MATCH_1}${CMAKE_MATCH_2}-real")
    endif()
  endforeach()
  set(${variable} "${_archs}" PARENT_SCOPE)
endfunction()
