# ONNX Runtime's C++ headers and library as ONNXRuntime::ONNXRuntime.
#
# Looks in ONNXRUNTIME_ROOT (variable or environment), then where the system keeps such things. Understood layouts:
#   include/onnxruntime_cxx_api.h                       the archives of ONNX Runtime's releases
#   include/onnxruntime/onnxruntime_cxx_api.h           Debian
#   include/onnxruntime/core/session/onnxruntime_cxx_api.h   cmake --install of its source tree
# Sets ONNXRuntime_FOUND, ONNXRuntime_VERSION (1.N of the headers), ONNXRuntime_INCLUDE_DIR, ONNXRuntime_LIBRARY.
include("${CMAKE_CURRENT_LIST_DIR}/shared_library.cmake")

set(ONNXRuntime_roots ${ONNXRUNTIME_ROOT} $ENV{ONNXRUNTIME_ROOT})
find_path(ONNXRuntime_INCLUDE_DIR onnxruntime_cxx_api.h
  HINTS ${ONNXRuntime_roots}
  PATH_SUFFIXES include include/onnxruntime include/onnxruntime/core/session onnxruntime onnxruntime/core/session
)
set(ONNXRuntime_folders)
foreach(root IN LISTS ONNXRuntime_roots)
  list(APPEND ONNXRuntime_folders "${root}/lib" "${root}/lib64" "${root}/lib/${CMAKE_LIBRARY_ARCHITECTURE}")
endforeach()
crt_runtime_find_library(ONNXRuntime_LIBRARY onnxruntime ${ONNXRuntime_folders})
mark_as_advanced(ONNXRuntime_INCLUDE_DIR)

if(ONNXRuntime_INCLUDE_DIR)
  file(STRINGS "${ONNXRuntime_INCLUDE_DIR}/onnxruntime_c_api.h" ONNXRuntime_line REGEX "^#define ORT_API_VERSION [0-9]+")
  string(REGEX REPLACE "^#define ORT_API_VERSION ([0-9]+).*" "1.\\1" ONNXRuntime_VERSION "${ONNXRuntime_line}")
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(ONNXRuntime
  REQUIRED_VARS ONNXRuntime_LIBRARY ONNXRuntime_INCLUDE_DIR
  VERSION_VAR ONNXRuntime_VERSION
  REASON_FAILURE_MESSAGE "Set ONNXRUNTIME_ROOT to a folder with include/ and lib/, such as an unpacked release of ONNX Runtime"
)

if(ONNXRuntime_FOUND AND NOT TARGET ONNXRuntime::ONNXRuntime)
  add_library(ONNXRuntime::ONNXRuntime SHARED IMPORTED)
  set_target_properties(ONNXRuntime::ONNXRuntime PROPERTIES
    IMPORTED_LOCATION "${ONNXRuntime_LIBRARY}"
    INTERFACE_INCLUDE_DIRECTORIES "${ONNXRuntime_INCLUDE_DIR}"
  )
endif()
