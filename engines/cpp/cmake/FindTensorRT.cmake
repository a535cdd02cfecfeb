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
  set(prefix TensorRT_${component})
  set(root_name ${${prefix}_root_name})
  set(roots ${${root_name}} $ENV{${root_name}})
  set(folders)
  foreach(root IN LISTS roots)
    list(APPEND folders "${root}/lib" "${root}/lib64" "${root}")
  endforeach()
  # Both products call their header NvInfer.h, so TensorRT-RTX is only looked for where it was said to be.
  set(system)
  if(component STREQUAL "rtx")
    set(system NO_DEFAULT_PATH)
  endif()
  find_path(${prefix}_INCLUDE_DIR NvInfer.h HINTS ${roots} PATH_SUFFIXES include ${system})
  crt_runtime_find_library(${prefix}_LIBRARY ${${prefix}_library_name} ${folders})
  mark_as_advanced(${prefix}_INCLUDE_DIR)

  set(missing)
  if(NOT ${prefix}_INCLUDE_DIR)
    list(APPEND missing "no NvInfer.h (set ${root_name})")
  endif()
  if(NOT ${prefix}_LIBRARY)
    list(APPEND missing "no library ${${prefix}_library_name} (set ${root_name})")
  endif()
  if(NOT TensorRT_CUDA_INCLUDE_DIR OR NOT TensorRT_CUDART_LIBRARY)
    list(APPEND missing "no CUDA runtime (set CUDA_ROOT)")
  endif()
  list(JOIN missing ", " ${prefix}_MISSING)
  if(missing)
    set(${prefix}_FOUND FALSE)
    continue()
  endif()
  set(${prefix}_FOUND TRUE)
  crt_runtime_tensorrt_version(${prefix}_VERSION "${${prefix}_INCLUDE_DIR}/NvInferVersion.h" ${component})
  if(NOT TARGET TensorRT::${component})
    add_library(TensorRT::${component} SHARED IMPORTED)
    # System headers: the warnings that this project asks for are not theirs.
    set_target_properties(TensorRT::${component} PROPERTIES
      IMPORTED_LOCATION "${${prefix}_LIBRARY}"
      INTERFACE_INCLUDE_DIRECTORIES "${${prefix}_INCLUDE_DIR};${TensorRT_CUDA_INCLUDE_DIR}"
      INTERFACE_LINK_LIBRARIES "${TensorRT_CUDART_LIBRARY}"
    )
  endif()
endforeach()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(TensorRT HANDLE_COMPONENTS)
