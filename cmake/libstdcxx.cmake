# One C++ library in the process: the shared one that torch uses.
#
# Where a toolchain has only libstdc++.a, or is told -static-libstdc++, each of our libraries would get a copy of its
# own, and an exception that crosses from libdilated into torch would end the program. Naming the shared library puts it
# ahead of the compiler's own -lstdc++.
function(dilated_share_libstdcxx target)
  if(NOT DEFINED DILATED_LIBSTDCXX)
    execute_process(
      COMMAND "${CMAKE_CXX_COMPILER}" -print-file-name=libstdc++.so.6
      OUTPUT_VARIABLE _path OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    if(NOT IS_ABSOLUTE "${_path}")
      find_library(_found NAMES libstdc++.so.6 PATHS /usr/lib/${CMAKE_LIBRARY_ARCHITECTURE} NO_CACHE)
      set(_path "${_found}")
    endif()
    set(DILATED_LIBSTDCXX "${_path}" CACHE FILEPATH "The shared libstdc++ to link to; empty: leave it to the compiler")
  endif()
  if(DILATED_LIBSTDCXX)
    target_link_libraries(${target} PRIVATE "${DILATED_LIBSTDCXX}")
  endif()
endfunction()
