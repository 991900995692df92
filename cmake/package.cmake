# What is installed: in a wheel the prefix is the Python package's folder, elsewhere any folder.
#   lib/libdilated.so  include/dilated/  share/cmake/dilated/  and for Python _C, _build_info.py
include(CMakePackageConfigHelpers)
set(_generated "${PROJECT_BINARY_DIR}/generated")

# torch and NVIDIA's wheels (libcudart) are the package's neighbours in site-packages; where they are not (a virtual
# environment that sees its base's packages, a prefix of any kind), their paths help. But not into a folder that is gone
# after the build: pip's own environment, which holds a torch where none was installed.
set(_rpath "$ORIGIN" "$ORIGIN/../../torch/lib")
if(DILATED_USE_CUDA)
  list(APPEND _rpath "$ORIGIN/../../nvidia/cu${CUDAToolkit_VERSION_MAJOR}/lib")
endif()
if(NOT DILATED_TORCH_DIR MATCHES "/pip-build-env-")
  list(APPEND _rpath "${DILATED_TORCH_DIR}/lib" ${CUDAToolkit_LIBRARY_DIR})
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
