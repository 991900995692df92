# The CPU kernels are compiled once per instruction set; csrc/kernels/cpu/attention.cpp picks one when it runs.
#
# dilated_add_isa_variants(<target> <source>) compiles the source with -DDILATED_ISA=<name>, the name being the
# namespace that its functions go into: baseline everywhere, avx2 and avx512 on x86-64 as well.
#
# Of an inline function that several objects hold, the linker keeps the first. Static libraries come after the target's
# own objects (an OBJECT library would come before), here baseline, avx2, avx512: so what an older CPU shares with a
# newer one is always in the older one's instructions.
function(dilated_add_isa_variants target source)
  set(_isas baseline)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
    list(APPEND _isas avx2 avx512)
    set(_flags_avx2 -mavx2 -mfma -mf16c)
    set(_flags_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl ${_flags_avx2})
  endif()
  foreach(_isa IN LISTS _isas)
    set(_name ${target}_${_isa})
    add_library(${_name} STATIC ${source})
    target_compile_features(${_name} PRIVATE cxx_std_20)
    target_compile_definitions(${_name} PRIVATE DILATED_ISA=${_isa})
    # None of these changes what is computed beyond the rounding of a fused multiply-add.
    target_compile_options(${_name} PRIVATE
      -O3 -fno-math-errno -fno-trapping-math -ffp-contract=fast ${_flags_${_isa}})
    target_include_directories(${_name} PRIVATE
      "${PROJECT_SOURCE_DIR}/csrc" $<TARGET_PROPERTY:${target},INTERFACE_INCLUDE_DIRECTORIES>)
    dilated_set_warnings(${_name})
    target_link_libraries(${target} PRIVATE ${_name})
  endforeach()
endfunction()
