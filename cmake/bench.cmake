# Benchmarks: each bench/*_bench.cc is a program of its own.
# SPDX-License-Identifier: Apache-2.0
find_package(benchmark REQUIRED)

file(GLOB bench_sources CONFIGURE_DEPENDS bench/*_bench.cc)
foreach(source IN LISTS bench_sources)
  get_filename_component(name ${source} NAME_WE)
  add_executable(${name} ${source})
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/bench)
  target_link_libraries(${name} PRIVATE ropewalk_measure ropewalk_flags benchmark::benchmark)
endforeach()

# What a call costs on the host beside the driver's own launch.
foreach(name opencl_launch cuda_launch)
  add_executable(${name} bench/${name}.cc)
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/bench)
  target_link_libraries(${name} PRIVATE ropewalk_conformance ropewalk_flags)
endforeach()

# For bench/cuda_table.py.
add_executable(cuda_inputs bench/cuda_inputs.cc)
set_target_properties(cuda_inputs PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/bench)
target_link_libraries(cuda_inputs PRIVATE ropewalk_conformance ropewalk_flags ropewalk_json)
