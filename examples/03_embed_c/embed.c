/* Stream text from a bundle: embed_c BUNDLE PROMPT. */
#include <crt_runtime/crt.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* What there is to clean up, in the order it was made. */
typedef struct {
  crt_bundle* bundle;
  int64_t* ids;
  crt_session* session;
  crt_generation* generation;
} program;

/* A model may say anything: a terminal gets no control character but newline and tab. Pieces are whole UTF-8 characters,
   of which C2 80 to C2 9F are control characters too. */
static void print_to_terminal(const unsigned char* text, size_t text_bytes) {
  size_t i;
  for (i = 0; i < text_bytes; ++i) {
    const int control = (text[i] < 0x20 && text[i] != '\n' && text[i] != '\t') || text[i] == 0x7F;
    if (text[i] == 0xC2 && i + 1 < text_bytes && text[i + 1] < 0xA0) {
      putchar('?');
      ++i;
    } else {
      putchar(control ? '?' : text[i]);
    }
  }
}

static int32_t print_piece(void* user, int64_t row, int64_t token, const char* text, size_t text_bytes) {
  (void)user, (void)row, (void)token;
  if (isatty(STDOUT_FILENO)) {
    print_to_terminal((const unsigned char*)text, text_bytes);
  } else {
    fwrite(text, 1, text_bytes, stdout);
  }
  fflush(stdout);
  return !ferror(stdout); /* 0 stops the row */
}

/* The prompt's ids: ask for their number, then for the ids. */
static crt_status encode(program* p, const char* text, size_t* count) {
  crt_status status = crt_encode(p->bundle, text, strlen(text), 1, NULL, 0, count);
  if (status != CRT_OK) return status;
  p->ids = malloc((*count + 1) * sizeof *p->ids);
  if (p->ids == NULL) abort();
  return crt_encode(p->bundle, text, strlen(text), 1, p->ids, *count, count);
}

static crt_status start(program* p, size_t count) {
  static const char* const stop_strings[] = {"\n\n"};
  const int64_t length = (int64_t)count;
  crt_sampling_options sampling;
  crt_generation_options options;
  crt_session_options size;
  crt_status status;

  crt_sampling_options_init(&sampling, sizeof sampling);
  sampling.temperature = 0.7;
  sampling.top_k = 20;
  sampling.repetition_penalty = 1.05;
  sampling.seed = 1;
  crt_generation_options_init(&options, sizeof options);
  options.max_new_tokens = 120;
  options.sampling = &sampling;
  options.stop_strings = stop_strings;
  options.stop_string_count = 1;
  options.callback = print_piece;
  crt_session_options_init(&size, sizeof size);
  size.capacity = length + options.max_new_tokens; /* attention costs by capacity */

  status = crt_session_open(p->bundle, NULL, &size, &p->session);
  if (status != CRT_OK) return status;
  return crt_session_generate(p->session, p->ids, &length, 1, &options, &p->generation);
}

static crt_status run(program* p, const char* path, const char* prompt) {
  size_t count = 0;
  int64_t token = CRT_NO_TOKEN;
  int32_t more = 1;
  const int64_t* tokens = NULL;
  const char* rest = NULL;
  size_t rest_bytes = 0;
  crt_stop_reason reason = CRT_STOP_RUNNING;
  crt_status status = crt_bundle_open(path, NULL, &p->bundle);
  if (status == CRT_OK) status = encode(p, prompt, &count);
  if (status == CRT_OK) status = start(p, count);
  while (status == CRT_OK && more) status = crt_generation_next(p->generation, &token, 1, &more);
  /* Held back in case more follows, which nothing does. */
  if (status == CRT_OK) status = crt_generation_rest(p->generation, 0, &rest, &rest_bytes);
  if (status == CRT_OK) fwrite(rest, 1, rest_bytes, stdout);
  if (status == CRT_OK) status = crt_generation_tokens(p->generation, 0, &tokens, &count);
  if (status == CRT_OK) status = crt_generation_stop_reason(p->generation, 0, &reason);
  if (status == CRT_OK) printf("\n[%lu tokens, ended by %s]\n", (unsigned long)count, crt_stop_reason_name(reason));
  return status;
}

int main(int count, char** arguments) {
  program p = {NULL, NULL, NULL, NULL};
  crt_status status;
  if (count != 3) {
    fputs("usage: embed_c BUNDLE PROMPT\n", stderr);
    return 2;
  }
  status = run(&p, arguments[1], arguments[2]);
  if (status != CRT_OK) fprintf(stderr, "error: %s\n", crt_last_error());
  crt_generation_free(p.generation);
  crt_session_close(p.session);
  free(p.ids);
  crt_bundle_close(p.bundle);
  if (status != CRT_OK) return 1;
  if (fflush(stdout) != 0 || ferror(stdout)) {
    fputs("error: stdout cannot be written to\n", stderr);
    return 3;
  }
  return 0;
}
