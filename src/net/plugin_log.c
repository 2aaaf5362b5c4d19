/* The logger that NCCL net plugins call: a C variadic, which stable Rust cannot define. Formats the line and hands it on. */
#include <stdarg.h>
#include <stdio.h>

typedef int (*wanted_fn)(int level);
typedef void (*line_fn)(int level, const char *file, int line, const char *text);

static wanted_fn wanted;
static line_fn take;

__attribute__((visibility("hidden"))) void uccl_p2p_plugin_log(int level, unsigned long flags, const char *file, int line, const char *format, ...) {
  char text[1024];
  va_list arguments;
  (void)flags;
  if (!take || !wanted || !wanted(level) || !format) return;
  va_start(arguments, format);
  int length = vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (length < 0) return;
  take(level, file, line, text);
}

/* Called once, before the first plugin gets the logger. */
__attribute__((visibility("hidden"))) void uccl_p2p_plugin_log_to(wanted_fn is_wanted, line_fn sink) {
  wanted = is_wanted;
  take = sink;
}
