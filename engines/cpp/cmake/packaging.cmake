# Installation and the package that find_package(crt_runtime) finds.
include(CMakePackageConfigHelpers)

set(package_folder "${CMAKE_INSTALL_LIBDIR}/cmake/crt_runtime")

# A library is found beside this one wherever the folder is moved to; otherwise where it was found at build time.
set_target_properties(crt_runtime PROPERTIES INSTALL_RPATH "\$ORIGIN")
if(CRT_RUNTIME_INSTALL_ONNXRUNTIME AND CRT_RUNTIME_WITH_ONNXRUNTIME)
  get_filename_component(onnxruntime_file "${ONNXRuntime_LIBRARY}" REALPATH)
  install(FILES "${onnxruntime_file}" DESTINATION "${CMAKE_INSTALL_LIBDIR}" RENAME libonnxruntime.so.1)
else()
  set_target_properties(crt_runtime crt-selftest PROPERTIES INSTALL_RPATH_USE_LINK_PATH ON)
endif()

install(TARGETS crt_runtime EXPORT crt_runtime-targets)
# The program finds the library in the installed folder, wherever that is moved to.
file(RELATIVE_PATH library_folder "/${CMAKE_INSTALL_BINDIR}" "/${CMAKE_INSTALL_LIBDIR}")
set_target_properties(crt-selftest PROPERTIES INSTALL_RPATH "\$ORIGIN/${library_folder}")
install(TARGETS crt-selftest)
install(DIRECTORY include/crt_runtime DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
install(EXPORT crt_runtime-targets NAMESPACE crt_runtime:: DESTINATION "${package_folder}")

set(CRT_RUNTIME_STATIC_DEPENDENCIES "")
if(NOT BUILD_SHARED_LIBS)
  # Linked as C, a program would miss the C++ standard library.
  string(CONCAT CRT_RUNTIME_STATIC_DEPENDENCIES
    "get_property(crt_runtime_languages GLOBAL PROPERTY ENABLED_LANGUAGES)\n"
    "if(NOT CXX IN_LIST crt_runtime_languages)\n"
    "  set(crt_runtime_FOUND FALSE)\n"
    "  set(crt_runtime_NOT_FOUND_MESSAGE \"this crt_runtime is a static library, which a project in C alone cannot link: "
    "enable_language(CXX) before find_package(crt_runtime), or install the shared library\")\n"
    "  return()\n"
    "endif()\n"
    "find_dependency(OpenSSL COMPONENTS Crypto)\nfind_dependency(Threads)\n")
  if(CRT_RUNTIME_WITH_ONNXRUNTIME)
    string(APPEND CRT_RUNTIME_STATIC_DEPENDENCIES "find_dependency(ONNXRuntime)\n")
  endif()
  if(CRT_RUNTIME_WITH_TENSORRT)
    string(APPEND CRT_RUNTIME_STATIC_DEPENDENCIES "find_dependency(TensorRT COMPONENTS tensorrt)\n")
  endif()
  if(CRT_RUNTIME_WITH_TENSORRT_RTX)
    string(APPEND CRT_RUNTIME_STATIC_DEPENDENCIES "find_dependency(TensorRT COMPONENTS rtx)\n")
  endif()
  install(FILES cmake/FindONNXRuntime.cmake cmake/FindTensorRT.cmake cmake/shared_library.cmake
    DESTINATION "${package_folder}")
endif()
configure_package_config_file(cmake/crt_runtime-config.cmake.in crt_runtime-config.cmake
  INSTALL_DESTINATION "${package_folder}")
# Before 1.0 a minor version may break what it offers.
write_basic_package_version_file(crt_runtime-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/crt_runtime-config.cmake"
  "${CMAKE_CURRENT_BINARY_DIR}/crt_runtime-config-version.cmake" DESTINATION "${package_folder}")
