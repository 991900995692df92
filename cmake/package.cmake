# What is installed: in a wheel the prefix is the Python package's folder, elsewhere any folder.
#   lib/libdilated.so  include/dilated/  share/cmake/dilated/  and for Python _C, _build_info.py
include(CMakePackageConfigHelpers)
set(_generated "${PROJECT_BINARY_DIR}/generated")

# torch and NVIDIA's wheels (libcudart) are the package's neighbours in site-packages. Where they are not (a virtual
# environment that sees its base's packages, a prefix of any kind), torch is in the process before libdilated: Python has
# imported it, and C++ programs link it (dilatedConfig.cmake). So nothing says where they were on this machine.
set(_rpath "$ORIGIN" "$ORIGIN/../../torch/lib")
if(DILATED_USE_CUDA)
  list(APPEND _rpath "$ORIGIN/../../nvidia/cu${CUDAToolkit_VERSION_MAJOR}/lib")
endif()
set_target_properties(dilated PROPERTIES INSTALL_RPATH "${_rpath}")
install(TARGETS dilated EXPORT dilatedTargets LIBRARY DESTINATION lib)
install(DIRECTORY csrc/include/dilated DESTINATION include)

if(DILATED_BUILD_PYTHON)
  set(_with_cuda False)
  set(_cuda_version "")
  set(_cuda_archs "")
  if(DILATED_USE_CUDA)
    set(_with_cuda True)
    set(_cuda_version "${CUDAToolkit_VERSION}")
    set(_cuda_archs "${CMAKE_CUDA_ARCHITECTURES}")
  endif()
  configure_file(cmake/_build_info.py.in "${_generated}/_build_info.py" @ONLY)
  set_target_properties(_C PROPERTIES INSTALL_RPATH "$ORIGIN/lib")
  install(TARGETS _C LIBRARY DESTINATION .)
  install(FILES "${_generated}/_build_info.py" DESTINATION .)
endif()

install(EXPORT dilatedTargets NAMESPACE dilated:: DESTINATION share/cmake/dilated)
configure_package_config_file(cmake/dilatedConfig.cmake.in "${_generated}/dilatedConfig.cmake"
  INSTALL_DESTINATION share/cmake/dilated)
write_basic_package_version_file("${_generated}/dilatedConfigVersion.cmake" COMPATIBILITY SameMinorVersion)
install(FILES cmake/torch_version.cmake "${_generated}/dilatedConfig.cmake" "${_generated}/dilatedConfigVersion.cmake"
  DESTINATION share/cmake/dilated)
