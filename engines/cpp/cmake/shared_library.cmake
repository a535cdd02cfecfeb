# crt_runtime_find_library(VARIABLE NAME folder...): NAME's shared library in one of the folders, else where the system
# keeps libraries. Wheels and run-time packages carry libNAME.so.1 without the libNAME.so that find_library() looks for.
function(crt_runtime_find_library variable name)
  set(folders ${ARGN})
  set(candidates)  # a function sees the variables of its caller
  foreach(folder IN LISTS folders)
    file(GLOB versioned "${folder}/lib${name}.so.*")
    list(APPEND candidates ${versioned})
  endforeach()
  find_library(${variable} NAMES ${name} HINTS ${folders})
  if(NOT ${variable} AND candidates)
    list(SORT candidates COMPARE NATURAL)
    list(GET candidates 0 first)  # the shortest name is the soname, which is what loads at run time
    set(${variable} "${first}" CACHE FILEPATH "shared library ${name}" FORCE)
  endif()
  mark_as_advanced(${variable})
endfunction()
