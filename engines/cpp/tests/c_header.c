/* Compiled as C99 with -pedantic -Wall -Wextra -Werror: crt.h is a C header, and a C program links against it. */
#include "crt_runtime/crt.h"

#include <string.h>

int main(void) {
  crt_session_options options;
  crt_session_options_init(&options, sizeof options);
  if (options.batch != 1 || options.struct_size != sizeof options) return 1;
  if (crt_session_open(NULL, NULL, &options, NULL) != CRT_ERROR_INPUT) return 2;
  if (strlen(crt_last_error()) == 0 || strlen(crt_version()) == 0) return 3;
  crt_session_close(NULL);
  return 0;
}
