# `cpack` in a build folder: one archive for machines with a GPU and without development packages. It holds the
# command, the GPU backend, its tests, the files of data and every library but the C library's and NVIDIA's, which
# it finds on the machine, in Python wheels' folders too (validation/gpu/run.sh). `./setup bundle` makes it.
set(_targets partita partita_cuda_plugin)
if(TARGET gpu_test)
  list(APPEND _targets gpu_test)
endif()
set_target_properties(${_targets} PROPERTIES INSTALL_RPATH "$ORIGIN/../lib")
install(TARGETS ${_targets} RUNTIME_DEPENDENCY_SET libraries RUNTIME DESTINATION bin LIBRARY DESTINATION bin)
install(RUNTIME_DEPENDENCY_SET libraries
  PRE_EXCLUDE_REGEXES "libcud.*" "libcublas.*" "libnccl.*" "libnvrtc.*" "ld-linux.*"
  POST_EXCLUDE_REGEXES ".*/lib(c|m|dl|rt|pthread|resolv|util)\\.so.*"
  LIBRARY DESTINATION lib)
install(PROGRAMS validation/gpu/run.sh DESTINATION .)
install(PROGRAMS validation/gpu/layer.py validation/gpu/speed.py DESTINATION data/validation/gpu)
foreach(folder models topologies simulator/plan/frameworks validation)
  cmake_path(GET folder PARENT_PATH above)
  install(DIRECTORY ${folder} DESTINATION data/${above} FILES_MATCHING PATTERN "*.yaml")
endforeach()
set(CPACK_GENERATOR TGZ)
set(CPACK_PACKAGE_FILE_NAME partita-${PROJECT_VERSION}-cuda${CUDAToolkit_VERSION_MAJOR}-${CMAKE_SYSTEM_PROCESSOR})
include(CPack)
