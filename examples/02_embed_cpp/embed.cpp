// Stream text from a bundle: embed_cpp BUNDLE PROMPT.
#include <crt_runtime/crt_runtime.hpp>

#include <unistd.h>

#include <cstdint>
#include <iostream>
#include <string>

namespace {

void stream(const std::string& path, const std::string& prompt) {
  crt::Bundle bundle = crt::Bundle::load(path);
  const auto ids = bundle.tokenizer().encode_prompt(prompt);

  crt::GenerationOptions options;
  options.max_new_tokens = 120;
  options.sampling.temperature = 0.7;
  options.sampling.top_k = 20;
  options.sampling.repetition_penalty = 1.05;
  options.sampling.seed = 1;
  options.stop_strings = {"\n\n"};

  // Attention costs by capacity, so take what this call needs and not all that the model could hold.
  crt::SessionOptions size;
  size.capacity = static_cast<std::int64_t>(ids.size()) + options.max_new_tokens;
  crt::Session session = bundle.session(bundle.default_target(), size);

  // Pieces are whole characters, given as soon as they are complete; false stops the row. A model may say anything, so
  // a terminal gets its control characters as escapes.
  const bool terminal = isatty(STDOUT_FILENO) != 0;
  const auto print = [terminal](std::int64_t, std::int64_t, const std::string& piece) {
    std::cout << (terminal ? crt::visible(piece) : piece) << std::flush;
    return std::cout.good();
  };
  crt::Generation generation = session.generate({ids}, options, print);
  std::int64_t token = crt::kNoToken;
  while (generation.next(&token)) {
  }
  std::cout << generation.rest(0);  // held back in case more follows, which nothing does
  std::cout << "\n[" << generation.tokens(0).size() << " tokens, ended by "
            << crt::stop_reason_name(generation.stop_reason(0)) << "]\n" << std::flush;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) {
    std::cerr << "usage: embed_cpp BUNDLE PROMPT\n";
    return 2;
  }
  try {
    stream(arguments[1], arguments[2]);
  } catch (const crt::Error& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  }
  if (!std::cout) {
    std::cerr << "error: stdout cannot be written to\n";
    return 3;
  }
  return 0;
}
