# What every target of ours is compiled with, and the one way to add a library.

add_library(partita_flags INTERFACE)
# -ffp-contract=off: both compilers would otherwise fuse a*b+c on some machines only,
# and the same inputs must give the same bytes out everywhere.
# nvcc has other options, its own text and other warnings.
target_compile_options(partita_flags INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wconversion -Wshadow -ffp-contract=off>)
if(PARTITA_WERROR)
  target_compile_options(partita_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Werror>)
endif()
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  # GCC 12 invents overlapping copies inside std::string: https://gcc.gnu.org/PR105651
  target_compile_options(partita_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wno-restrict>)
endif()
if(PARTITA_SANITIZE)
  # Of a GPU's kernels only the text that the host runs is looked at.
  target_compile_options(partita_flags INTERFACE
    "$<$<COMPILE_LANGUAGE:CXX>:SHELL:-fsanitize=${PARTITA_SANITIZE} -fno-omit-frame-pointer>")
  # GCC 12 takes std::regex's functions for uninitialised there (its bug 105562).
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    target_compile_options(partita_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wno-maybe-uninitialized>)
  endif()
  target_link_options(partita_flags INTERFACE "$<$<LINK_LANGUAGE:CXX>:-fsanitize=${PARTITA_SANITIZE}>")
endif()

# partita_library(NAME SOURCES a.cpp ... DEPS base ... PRIVATE_DEPS fmt::fmt ...)
# Adds partita_NAME. DEPS are the project's own targets it may include; third-party
# libraries stay private so that their headers do not leak through ours.
function(partita_library name)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPS;PRIVATE_DEPS" ${ARGN})
  add_library(partita_${name} STATIC ${ARG_SOURCES})
  target_include_directories(partita_${name} PUBLIC ${PROJECT_SOURCE_DIR})
  list(TRANSFORM ARG_DEPS PREPEND partita_)
  target_link_libraries(partita_${name} PUBLIC ${ARG_DEPS} PRIVATE partita_flags fmt::fmt ${ARG_PRIVATE_DEPS})
endfunction()
