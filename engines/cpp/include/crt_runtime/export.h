/* What the shared library shows: everything else in it is hidden. */
#ifndef CRT_RUNTIME_EXPORT_H
#define CRT_RUNTIME_EXPORT_H

#if defined(__GNUC__) || defined(__clang__)
#define CRT_RUNTIME_API __attribute__((visibility("default")))
#define CRT_RUNTIME_LOCAL __attribute__((visibility("hidden")))
#else
#define CRT_RUNTIME_API
#define CRT_RUNTIME_LOCAL
#endif

#endif
