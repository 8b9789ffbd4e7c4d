# Fails the build if an object compiled for a newer instruction set defines a symbol that code outside
# its namespace could be linked to: the linker keeps one copy of an inline function or a template,
# and an old processor would crash on ours. Run with -DNM, -DISA and -DOBJECTS.
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND ${NM} -C --extern-only --defined-only ${object}
                  OUTPUT_VARIABLE symbols RESULT_VARIABLE failed)
  if(failed)
    message(FATAL_ERROR "${NM} ${object}: ${failed}")
  endif()
  string(REGEX MATCHALL "[^\n]+" symbols "${symbols}")
  list(FILTER symbols EXCLUDE REGEX "^[0-9a-f]+ [TRDB] pyllm::${ISA}::")
  if(symbols)
    list(JOIN symbols "\n  " symbols)
    message(FATAL_ERROR "${object}: expected only symbols of pyllm::${ISA}, got\n  ${symbols}")
  endif()
endforeach()
