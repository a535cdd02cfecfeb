# TensorRT and TensorRT-RTX with the CUDA runtime they need, as TensorRT::tensorrt and TensorRT::rtx.
#
# find_package(TensorRT COMPONENTS tensorrt rtx) looks in TENSORRT_ROOT and TENSORRT_RTX_ROOT (variable or environment,
# each with include/ and lib/), and for CUDA in CUDA_ROOT, CUDA_PATH and /usr/local/cuda.
# Sets per component TensorRT_<component>_FOUND, _VERSION, _INCLUDE_DIR, _LIBRARY, and _MISSING: what was not found.
include("${CMAKE_CURRENT_LIST_DIR}/shared_library.cmake")

set(TensorRT_tensorrt_root_name TENSORRT_ROOT)
set(TensorRT_tensorrt_library_name nvinfer)
set(TensorRT_rtx_root_name TENSORRT_RTX_ROOT)
set(TensorRT_rtx_library_name tensorrt_rtx)

set(TensorRT_cuda_roots ${CUDA_ROOT} $ENV{CUDA_ROOT} $ENV{CUDA_PATH} /usr/local/cuda)
find_path(TensorRT_CUDA_INCLUDE_DIR cuda_runtime_api.h HINTS ${TensorRT_cuda_roots} PATH_SUFFIXES include)
set(TensorRT_folders)
foreach(root IN LISTS TensorRT_cuda_roots)
  list(APPEND TensorRT_folders "${root}/lib64" "${root}/lib")
endforeach()
crt_runtime_find_library(TensorRT_CUDART_LIBRARY cudart ${TensorRT_folders})
mark_as_advanced(TensorRT_CUDA_INCLUDE_DIR)

# NV_TENSORRT_MAJOR and so on, or TRT_MAJOR_ENTERPRISE and TRT_MAJOR_RTX: the spelling changed with the releases.
function(crt_runtime_tensorrt_version variable header component)
  set(suffixes "" "_ENTERPRISE")
  if(component STREQUAL "rtx")
    set(suffixes "_RTX" "")
  endif()
  set(parts)
  foreach(part MAJOR MINOR PATCH)
    foreach(suffix IN LISTS suffixes)
      file(STRINGS "${header}" line REGEX "^#define (NV_TENSORRT|TRT)_${part}${suffix} [0-9]+")
      if(line)
        string(REGEX REPLACE "^#define [A-Z_]+ ([0-9]+).*" "\\1" number "${line}")
        list(APPEND parts ${number})
        break()
      endif()
    endforeach()
  endforeach()
  list(JOIN parts "." version)
  set(${variable} "${version}" PARENT_SCOPE)
endfunction()

foreach(component IN LISTS TensorRT_FIND_COMPONENTS)
  set(TensorRT_prefix TensorRT_${component})
  set(TensorRT_root_name ${${TensorRT_prefix}_root_name})
  set(TensorRT_roots ${${TensorRT_root_name}} $ENV{${TensorRT_root_name}})
  set(TensorRT_folders)
  foreach(root IN LISTS TensorRT_roots)
    list(APPEND TensorRT_folders "${root}/lib" "${root}/lib64" "${root}")
  endforeach()
  # Both products call their header NvInfer.h, so TensorRT-RTX is only looked for where it was said to be.
  set(TensorRT_system)
  if(component STREQUAL "rtx")
    set(TensorRT_system NO_DEFAULT_PATH)
  endif()
  find_path(${TensorRT_prefix}_INCLUDE_DIR NvInfer.h HINTS ${TensorRT_roots} PATH_SUFFIXES include ${TensorRT_system})
  crt_runtime_find_library(${TensorRT_prefix}_LIBRARY ${${TensorRT_prefix}_library_name} ${TensorRT_folders})
  mark_as_advanced(${TensorRT_prefix}_INCLUDE_DIR)

  set(TensorRT_missing)
  if(NOT ${TensorRT_prefix}_INCLUDE_DIR)
    list(APPEND TensorRT_missing "no NvInfer.h (set ${TensorRT_root_name})")
  endif()
  if(NOT ${TensorRT_prefix}_LIBRARY)
    list(APPEND TensorRT_missing "no library ${${TensorRT_prefix}_library_name} (set ${TensorRT_root_name})")
  endif()
  if(NOT TensorRT_CUDA_INCLUDE_DIR OR NOT TensorRT_CUDART_LIBRARY)
    list(APPEND TensorRT_missing "no CUDA runtime (set CUDA_ROOT)")
  endif()
  list(JOIN TensorRT_missing ", " ${TensorRT_prefix}_MISSING)
  if(TensorRT_missing)
    set(${TensorRT_prefix}_FOUND FALSE)
    continue()
  endif()
  set(${TensorRT_prefix}_FOUND TRUE)
  crt_runtime_tensorrt_version(${TensorRT_prefix}_VERSION "${${TensorRT_prefix}_INCLUDE_DIR}/NvInferVersion.h" ${component})
  if(NOT TARGET TensorRT::${component})
    add_library(TensorRT::${component} SHARED IMPORTED)
    # System headers: the warnings that this project asks for are not theirs.
    set_target_properties(TensorRT::${component} PROPERTIES
      IMPORTED_LOCATION "${${TensorRT_prefix}_LIBRARY}"
      INTERFACE_INCLUDE_DIRECTORIES "${${TensorRT_prefix}_INCLUDE_DIR};${TensorRT_CUDA_INCLUDE_DIR}"
      INTERFACE_LINK_LIBRARIES "${TensorRT_CUDART_LIBRARY}"
    )
  endif()
endforeach()

foreach(TensorRT_name prefix root_name roots folders system missing cuda_roots)
  unset(TensorRT_${TensorRT_name})  # find_package() runs in the scope of its caller
endforeach()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(TensorRT HANDLE_COMPONENTS)
