/* C API of the crt runtime, for C and for every language that can call C. C99, no other header of this library needed.
 *
 * Calls. Every function that can fail returns a crt_status; CRT_OK is 0. crt_last_error() then says what was expected,
 * what was found, where, and how to fix it. A call that fails leaves its outputs alone. Output and handle pointers must
 * not be NULL unless the function says so: a NULL gives CRT_ERROR_INPUT. No C++ exception leaves this library.
 *
 * Handles. What _open, _new, _load, _fork, _snapshot and _generate give must be closed or freed once; NULL is harmless.
 * A session keeps what it needs of its bundle and a generation its session, so they may be closed in any order. Using
 * a handle after it was closed is undefined.
 *
 * Options. Declare a struct, call its _init with sizeof the struct, then set fields: the struct can grow in later
 * versions without breaking programs compiled against this one. NULL for options means the values that _init sets.
 *
 * Memory. Strings and arrays that are given out belong to the handle they come from. Strings are UTF-8; those with a
 * byte count may hold NUL bytes of the text and end with one more NUL that is not counted.
 *
 * Threads. A bundle may be used from any number of threads. A session, its generations and their text belong to one
 * thread at a time. A call on a session while another thread's call on it runs gives CRT_ERROR_INPUT; that does not
 * cover crt_session_position(), nor the drawing and the callback inside crt_generation_next(). Sessions of one bundle
 * run in parallel and share weights and threads. Snapshots that are not being freed may be read by any thread. Do not
 * cancel a thread inside a call.
 */
#ifndef CRT_RUNTIME_CRT_H
#define CRT_RUNTIME_CRT_H

#include <stddef.h>
#include <stdint.h>

#ifndef CRT_API
#if defined(_WIN32) && defined(CRT_RUNTIME_BUILDING)
#define CRT_API __declspec(dllexport)
#elif defined(_WIN32)
#define CRT_API __declspec(dllimport)
#elif defined(__GNUC__)
#define CRT_API __attribute__((visibility("default")))
#else
#define CRT_API
#endif
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* What went wrong, in the terms of the Python package's errors. */
typedef enum crt_status {
  CRT_OK = 0,
  CRT_ERROR_INPUT = 1,              /* an argument; nothing has changed */
  CRT_ERROR_BUNDLE = 2,             /* a bundle or snapshot is missing, damaged, hostile or foreign */
  CRT_ERROR_CONTRACT = 3,           /* a graph breaks its contract, or an engine failed or gave non-finite values */
  CRT_ERROR_UNSUPPORTED = 4,        /* this library or this model cannot do it */
  CRT_ERROR_MISSING_DEPENDENCY = 5, /* a runtime, driver or device is absent */
  CRT_ERROR_INTERNAL = 6            /* out of memory, or a bug in this library */
} crt_status;

/* What happens when a row's tokens no longer fit. */
typedef enum crt_on_full {
  CRT_ON_FULL_ERROR = 0,                /* CRT_ERROR_INPUT, nothing changes */
  CRT_ON_FULL_EVICT = 1,                /* models with an attention window: drop what the window no longer sees */
  CRT_ON_FULL_SLIDE = CRT_ON_FULL_EVICT /* another name */
} crt_on_full;

/* Why a row of a generation stopped. */
typedef enum crt_stop_reason {
  CRT_STOP_RUNNING = 0, /* it has not */
  CRT_STOP_MAX_NEW_TOKENS = 1,
  CRT_STOP_TOKEN = 2,
  CRT_STOP_STRING = 3,
  CRT_STOP_CALLBACK = 4
} crt_stop_reason;

/* Stands for "no token": a row that a step leaves alone, a stopped row, a model without such a token. */
#define CRT_NO_TOKEN ((int64_t)-1)

typedef struct crt_bundle crt_bundle;
typedef struct crt_session crt_session;
typedef struct crt_snapshot crt_snapshot;
typedef struct crt_generation crt_generation;
typedef struct crt_text_stream crt_text_stream;

/* ---- Library ---------------------------------------------------------------------------------------------------- */

/* Version of this library, such as "1.2.3"; never NULL. */
CRT_API const char* crt_version(void);
/* Message of this thread's last call that failed, "" if none has; valid until the thread's next failing call. */
CRT_API const char* crt_last_error(void);
/* "ok", "input", "bundle", "contract", "unsupported", "missing_dependency" or "internal"; else "unknown". */
CRT_API const char* crt_status_name(crt_status status);

/* ---- Bundle ----------------------------------------------------------------------------------------------------- */

typedef struct crt_bundle_options {
  size_t struct_size;
  int32_t allow_unvalidated; /* 0: refuse a bundle that was built without a parity check */
  const char* identity;      /* the one that the bundle must have; NULL for any */
} crt_bundle_options;
CRT_API void crt_bundle_options_init(crt_bundle_options* options, size_t struct_size);

/* The model as whoever runs it needs to know it; filled by crt_bundle_config() up to struct_size. */
typedef struct crt_model_config {
  size_t struct_size;
  int64_t vocab;
  int64_t hidden; /* size of what the head reads */
  int64_t max_position_embeddings;
  int64_t sliding_window;       /* keys that a full row keeps a place for, see CRT_ON_FULL_EVICT; 0: it cannot move */
  int64_t bos_token_id;         /* every sequence begins with it, once; CRT_NO_TOKEN if the model has none */
  const int64_t* eos_token_ids; /* each of them ends a sequence; belongs to the bundle */
  size_t eos_token_count;       /* 0 if the model has none */
  int64_t passes;               /* passes over a chunk that it was trained for */
  int32_t iterated;             /* 1: a chunk takes several passes; 0: one pass is exact */
  const char* tokenizer;        /* "byte", "tokenizer.json" or "none"; belongs to the bundle */
} crt_model_config;
CRT_API void crt_model_config_init(crt_model_config* config, size_t struct_size);

/* Open a bundle folder. options may be NULL. */
CRT_API crt_status crt_bundle_open(const char* path, const crt_bundle_options* options, crt_bundle** bundle);
CRT_API void crt_bundle_close(crt_bundle* bundle);
/* SHA-256 of manifest.json, hex: what snapshots are bound to. */
CRT_API crt_status crt_bundle_identity(const crt_bundle* bundle, const char** identity);
CRT_API crt_status crt_bundle_target_count(const crt_bundle* bundle, size_t* count);
/* Name of a target, index 0 to count - 1. */
CRT_API crt_status crt_bundle_target(const crt_bundle* bundle, size_t index, const char** name);
/* The first target that this library runs on a CPU, else on a GPU; CRT_ERROR_UNSUPPORTED if there is none. */
CRT_API crt_status crt_bundle_default_target(const crt_bundle* bundle, const char** name);
/* config: initialised by crt_model_config_init(). */
CRT_API crt_status crt_bundle_config(const crt_bundle* bundle, crt_model_config* config);
/* States that every token hands to the next one, 0 for a model without any. */
CRT_API crt_status crt_state_count(const crt_bundle* bundle, size_t* count);
/* Name of a state, index 0 to count - 1; "hidden" is the one that the head reads. Belongs to the bundle. */
CRT_API crt_status crt_state_name(const crt_bundle* bundle, size_t index, const char** name);
/* Dims of a state per token, int64 [dims]; they belong to the bundle. */
CRT_API crt_status crt_state_shape(const crt_bundle* bundle, size_t index, const int64_t** shape, size_t* dims);

/* ---- Text of models that read bytes (others give CRT_ERROR_UNSUPPORTED: use token ids) --------------------------- */

/* Token ids of a text of text_bytes bytes, which must be valid UTF-8. prompt: 1 puts the model's bos_token_id, if it
 * has one, in front, unless the text begins with it. *count is set to the number of ids. ids may be NULL to ask for
 * that number; if capacity is too small, nothing but *count is written and the call gives CRT_ERROR_INPUT. */
CRT_API crt_status crt_encode(const crt_bundle* bundle, const char* text, size_t text_bytes, int32_t prompt,
                              int64_t* ids, size_t capacity, size_t* count);
/* Text of token ids; bytes that are not valid UTF-8 become U+FFFD. *text_bytes is set to the length without the final
 * NUL. text may be NULL to ask for the length; if capacity is not above the length, nothing but *text_bytes is written
 * and the call gives CRT_ERROR_INPUT. */
CRT_API crt_status crt_decode(const crt_bundle* bundle, const int64_t* ids, size_t count, char* text, size_t capacity,
                              size_t* text_bytes);

/* Turns ids into text as they arrive and never splits a character. */
CRT_API crt_status crt_text_stream_new(const crt_bundle* bundle, crt_text_stream** stream);
/* Text that this id completes; empty while a character is incomplete. Valid until the stream's next call. */
CRT_API crt_status crt_text_stream_push(crt_text_stream* stream, int64_t token, const char** text, size_t* text_bytes);
/* What is still held back: U+FFFD for bytes that never became a character. Valid until the stream's next call. */
CRT_API crt_status crt_text_stream_finish(crt_text_stream* stream, const char** text, size_t* text_bytes);
CRT_API void crt_text_stream_free(crt_text_stream* stream);

/* ---- Session: a running model over a batch of rows, each with its own length ------------------------------------- */

typedef struct crt_session_options {
  size_t struct_size;
  int64_t batch;    /* rows; 1 */
  int64_t capacity; /* most tokens a row can hold; 0: the target's */
  int32_t threads;  /* CPU threads; 0: every core, -1: the target's */
  int32_t on_full;  /* a crt_on_full; CRT_ON_FULL_ERROR */
} crt_session_options;
CRT_API void crt_session_options_init(crt_session_options* options, size_t struct_size);

/* What passes may be besides a number of parallel passes over every chunk, which is exact with as many passes as the
 * chunk has tokens. */
#define CRT_PASSES_TARGETS_CHOICE 0 /* "prefill" of the target's entry in the manifest */
#define CRT_PASSES_EXACT (-1)       /* token by token, as crt_session_step() would */
/* Passes until their residual is below the target's bound, row by row; where the target's most passes do not get there
 * the rest of the chunk goes token by token. CRT_ERROR_UNSUPPORTED where the target has no bound. */
#define CRT_PASSES_ADAPTIVE (-2)

typedef struct crt_prefill_options {
  size_t struct_size;
  int64_t passes; /* a number of passes, or one of CRT_PASSES_...; CRT_PASSES_TARGETS_CHOICE */
  int64_t chunk;  /* most tokens of one call; 0: that of the target's choice, its limit for a number of passes */
} crt_prefill_options;
CRT_API void crt_prefill_options_init(crt_prefill_options* options, size_t struct_size);

/* Open a session. target may be NULL for crt_bundle_default_target(); options may be NULL. */
CRT_API crt_status crt_session_open(crt_bundle* bundle, const char* target, const crt_session_options* options,
                                    crt_session** session);
CRT_API void crt_session_close(crt_session* session);
CRT_API crt_status crt_session_target(const crt_session* session, const char** target);
CRT_API crt_status crt_session_batch(const crt_session* session, int64_t* batch);
CRT_API crt_status crt_session_capacity(const crt_session* session, int64_t* capacity);
CRT_API crt_status crt_session_vocab_size(const crt_session* session, int64_t* vocab);
/* Tokens in the cache of each row, int64 [batch]; valid until the session's next call. For the session's own thread. */
CRT_API crt_status crt_session_position(const crt_session* session, const int64_t** position);

/* Append tokens to every row, token by token or in parallel passes. ids: the tokens of all rows, one row after the other; lengths: int64
 * [rows], tokens of each row, 0 leaves a row alone; rows: the session's batch. options may be NULL. logits may be NULL,
 * else it is set as by crt_session_logits(). */
CRT_API crt_status crt_session_prefill(crt_session* session, const int64_t* ids, const int64_t* lengths, size_t rows,
                                       const crt_prefill_options* options, const float** logits);
/* Append one token per row, int64 [count], CRT_NO_TOKEN for none; count: the session's batch. logits may be NULL. */
CRT_API crt_status crt_session_step(crt_session* session, const int64_t* tokens, size_t count, const float** logits);
/* As crt_session_step(), but the logits stay where the engine computes until they are asked for: with
 * crt_session_next_tokens() a greedy loop on a GPU copies one id per row to the host. */
CRT_API crt_status crt_session_advance(crt_session* session, const int64_t* tokens, size_t count);
/* Logits after each row's last token, float32 [batch, vocab], NaN for a row without tokens; valid until the session's
 * next call. */
CRT_API crt_status crt_session_logits(crt_session* session, const float** logits);
/* The likeliest token after each row's last token, int64 [batch], CRT_NO_TOKEN for a row without tokens; valid until
 * the session's next call. */
CRT_API crt_status crt_session_next_tokens(crt_session* session, const int64_t** tokens);
/* Forget every token, zero caches and state, lift the refusal that follows a failed call. */
CRT_API crt_status crt_session_reset(crt_session* session);

/* Everything the session holds: state, caches, positions, logits, random counters and penalty history. */
CRT_API crt_status crt_session_snapshot(crt_session* session, crt_snapshot** snapshot);
/* Take everything from a snapshot of the same bundle, target and batch; any other gives CRT_ERROR_BUNDLE and changes
 * nothing. */
CRT_API crt_status crt_session_restore(crt_session* session, const crt_snapshot* snapshot);
/* A second session with the same content; the two go on independently. */
CRT_API crt_status crt_session_fork(crt_session* session, crt_session** fork);
/* Write a snapshot to a file that Python and C++ read alike; the file appears complete or not at all. */
CRT_API crt_status crt_snapshot_save(const crt_snapshot* snapshot, const char* path);
CRT_API crt_status crt_snapshot_load(const char* path, crt_snapshot** snapshot);
CRT_API void crt_snapshot_free(crt_snapshot* snapshot);

/* ---- Generation -------------------------------------------------------------------------------------------------- */

/* How the next token is chosen. Order: repetition penalty, temperature, top-k, top-p, min-p; ties to the lower id. The
 * same seed and logits give the same tokens in every language. */
typedef struct crt_sampling_options {
  size_t struct_size;
  double temperature;        /* 0: the likeliest token, no random number */
  double top_p;              /* keep the likeliest tokens that together reach this probability; 1: all */
  double min_p;              /* drop tokens less likely than this fraction of the likeliest; 0: none */
  double repetition_penalty; /* above 1 makes tokens that the row has seen less likely; 1: no penalty */
  int64_t top_k;             /* keep that many of the likeliest tokens; 0: all */
  uint32_t seed;             /* key of the random numbers; 0 */
} crt_sampling_options;
CRT_API void crt_sampling_options_init(crt_sampling_options* options, size_t struct_size);

/* Called for every new token, after the whole batch has drawn: its row, its id, and the text that it completes
 * (text_bytes bytes and a NUL; empty for models without byte tokenizer). The id is CRT_NO_TOKEN where a stop token lets
 * out text that was held back. Return 0 to stop the row, anything else to go on. It must not call the session. */
typedef int32_t (*crt_token_callback)(void* user, int64_t row, int64_t token, const char* text, size_t text_bytes);

typedef struct crt_generation_options {
  size_t struct_size;
  int64_t max_new_tokens;               /* most tokens per row; 64 */
  int64_t passes;                       /* how prompts are taken, as in crt_prefill_options */
  const crt_sampling_options* sampling; /* NULL: greedy */
  const int64_t* stop_tokens;           /* ids that end a row, besides the model's end-of-sequence tokens */
  size_t stop_token_count;
  const char* const* stop_strings; /* UTF-8 up to a NUL; end a row whose new text holds one; byte models only */
  size_t stop_string_count;
  int32_t ignore_eos;          /* 1: go on after the model's end-of-sequence tokens */
  crt_token_callback callback; /* NULL: none */
  void* user;                  /* given to the callback */
} crt_generation_options;
CRT_API void crt_generation_options_init(crt_generation_options* options, size_t struct_size);

/* Continue every row from its prompt; ids, lengths and rows as in crt_session_prefill(). A row of length 0, or rows = 0
 * for all of them, goes on from what the session holds. What options points at is copied, except user. The model runs
 * in crt_generation_next(); leave the session alone while its generation is being read. */
CRT_API crt_status crt_session_generate(crt_session* session, const int64_t* ids, const int64_t* lengths, size_t rows,
                                        const crt_generation_options* options, crt_generation** generation);
/* One new token per row into tokens, int64 [count], CRT_NO_TOKEN for a stopped row; count: the batch. *more is
 * set to 1, or to 0 when every row has stopped (tokens then holds nothing but CRT_NO_TOKEN). The last 1 may come with
 * no token at all, where a stop token lets out text that was held back. */
CRT_API crt_status crt_generation_next(crt_generation* generation, int64_t* tokens, size_t count, int32_t* more);
/* New tokens of a row so far; valid until the generation's next call. */
CRT_API crt_status crt_generation_tokens(const crt_generation* generation, size_t row, const int64_t** tokens,
                                         size_t* count);
/* New text of a row so far, whole characters, without the stop string; valid until the generation's next call. */
CRT_API crt_status crt_generation_text(const crt_generation* generation, size_t row, const char** text,
                                       size_t* text_bytes);
/* The part of that text that the last crt_generation_next() added; valid until the generation's next call. */
CRT_API crt_status crt_generation_piece(const crt_generation* generation, size_t row, const char** text,
                                        size_t* text_bytes);
/* Text of a row that is held back because a generation that goes on may change it, as if nothing followed: what may
 * become a stop string, U+FFFD for bytes that are no character yet. Append it where the text ends for good. Empty where
 * a stop token or a stop string ended the row. Valid until the generation's next call. */
CRT_API crt_status crt_generation_rest(crt_generation* generation, size_t row, const char** text, size_t* text_bytes);
CRT_API crt_status crt_generation_stop_reason(const crt_generation* generation, size_t row, crt_stop_reason* reason);
/* "running", "max_new_tokens", "stop_token", "stop_string" or "callback"; "unknown" for other values. */
CRT_API const char* crt_stop_reason_name(crt_stop_reason reason);
CRT_API void crt_generation_free(crt_generation* generation);

/* Choose one token by itself, as a generation does: for loops of one's own around crt_session_step().
 * logits: float32 [vocab]; seen: uint8 [vocab], 1 for the tokens that the penalty applies to, NULL for none; options:
 * NULL for greedy; row: row of the batch; step: tokens that this row has drawn before. */
CRT_API crt_status crt_sample_token(const float* logits, const uint8_t* seen, size_t vocab,
                                    const crt_sampling_options* options, uint32_t row, uint64_t step, int64_t* token);

#ifdef __cplusplus
}
#endif

#endif
