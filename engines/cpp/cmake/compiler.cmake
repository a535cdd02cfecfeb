# Warnings, sanitizers and the language standard of everything that is built here.
set(CMAKE_CXX_STANDARD 17)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_C_STANDARD 99)
set(CMAKE_C_EXTENSIONS OFF)

add_library(crt_runtime_warnings INTERFACE)
target_compile_options(crt_runtime_warnings INTERFACE -Wall -Wextra -Wpedantic -Wshadow -Wconversion)
if(CRT_RUNTIME_WERROR)
  target_compile_options(crt_runtime_warnings INTERFACE -Werror)
endif()

if(CRT_RUNTIME_SANITIZE)
  set(sanitizers -fsanitize=address,undefined)
  # Undefined behaviour ends the program as a memory error does: a line in a log would fail no test.
  add_compile_options(${sanitizers} -fno-sanitize-recover=all -fno-omit-frame-pointer -g)
  add_link_options(${sanitizers})
endif()

if(CRT_RUNTIME_FUZZ)
  if(NOT CMAKE_CXX_COMPILER_ID MATCHES Clang)
    message(FATAL_ERROR "CRT_RUNTIME_FUZZ needs clang: cmake -DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++")
  endif()
  set(sanitizers -fsanitize=address,undefined)
  add_compile_options(${sanitizers} -fsanitize=fuzzer-no-link -fno-sanitize-recover=all -fno-omit-frame-pointer -g)
  add_link_options(${sanitizers})
endif()
