// A bundle of edgeft from C++: `bundle FOLDER` replays its golden vectors, `bundle FOLDER "prompt"` answers greedily.
// Bundles for onnxruntime-genai (ort- targets). Answers held to labels or a grammar are run.py's: here they are free.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <limits>
#include <sstream>

#include "json.h"
#include "runtime.h"

using Ids = std::vector<int32_t>;

class Bundle {
 public:
  explicit Bundle(const std::string& folder) : manifest(read(folder)) {
    OgaModel* model = nullptr;
    check(OgaCreateModel(folder.c_str(), &model));
    model_.reset(model);
    OgaTokenizer* tokenizer = nullptr;
    check(OgaCreateTokenizer(model, &tokenizer));
    tokenizer_.reset(tokenizer);
    const char *name = "add_special_tokens", *off = "false";  // they are prefix_ids, of plain prompts alone
    check(OgaUpdateTokenizerOptions(tokenizer, &name, &off, 1));
  }

  // The tokens of a text as it is, or of one that the chat template has rendered (plain = false).
  Ids encode(const std::string& text, bool plain) const {
    OgaSequences* sequences = nullptr;
    check(OgaCreateSequences(&sequences));
    const Owned<OgaSequences, OgaDestroySequences> owned(sequences);
    check(OgaTokenizerEncode(tokenizer_.get(), text.c_str(), sequences));
    Ids ids = plain ? manifest.at("prefix_ids").numbers<int32_t>() : Ids();
    const int32_t* found = OgaSequencesGetSequenceData(sequences, 0);
    ids.insert(ids.end(), found, found + OgaSequencesGetSequenceCount(sequences, 0));
    return ids;
  }

  // A prompt as the model was trained on it: behind the system message that every row had, if they had one.
  Ids ask(const std::string& prompt) const {
    if (manifest.at("prompt_format").string == "plain") return encode(prompt, true);
    std::string messages = "[";
    if (manifest.has("system"))
      messages += "{\"role\": \"system\", \"content\": " + json_quoted(manifest.at("system").string) + "}, ";
    messages += "{\"role\": \"user\", \"content\": " + json_quoted(prompt) + "}]";
    const char* text = nullptr;
    check(OgaTokenizerApplyChatTemplate(tokenizer_.get(), nullptr, messages.c_str(), nullptr, true, &text));
    const std::string rendered = text;
    OgaDestroyString(text);
    return encode(rendered, false);
  }

  OgaTokenizer* tokenizer() const { return tokenizer_.get(); }

  const Json manifest;

 private:
  friend class Text;
  Owned<OgaModel, OgaDestroyModel> model_;
  Owned<OgaTokenizer, OgaDestroyTokenizer> tokenizer_;

  static Json read(const std::string& folder) {
    std::ifstream file(folder + "/bundle.json");
    if (!file) throw std::runtime_error(folder + "/bundle.json: cannot be read");
    std::stringstream text;
    text << file.rdbuf();
    return JsonReader(text.str()).read();
  }
};

// One text through the model, with a cache for so many tokens.
class Text {
 public:
  Text(const Bundle& bundle, size_t tokens) {
    OgaGeneratorParams* params = nullptr;
    check(OgaCreateGeneratorParams(bundle.model_.get(), &params));
    const Owned<OgaGeneratorParams, OgaDestroyGeneratorParams> owned(params);
    check(OgaGeneratorParamsSetSearchNumber(params, "max_length", static_cast<double>(tokens)));
    OgaGenerator* generator = nullptr;
    check(OgaCreateGenerator(bundle.model_.get(), params, &generator));
    generator_.reset(generator);
  }

  // Logits after the last of these tokens.
  std::vector<float> append(const Ids& ids) {
    check(OgaGenerator_AppendTokens(generator_.get(), ids.data(), ids.size()));
    OgaTensor* tensor = nullptr;
    check(OgaGenerator_GetLogits(generator_.get(), &tensor));
    const Owned<OgaTensor, OgaDestroyTensor> owned(tensor);
    size_t rank = 0;
    check(OgaTensorGetShapeRank(tensor, &rank));
    std::vector<int64_t> shape(rank);
    check(OgaTensorGetShape(tensor, shape.data(), rank));
    void* data = nullptr;
    check(OgaTensorGetData(tensor, &data));
    const float* logits = static_cast<const float*>(data);
    return std::vector<float>(logits, logits + shape.back());
  }

 private:
  Owned<OgaGenerator, OgaDestroyGenerator> generator_;
};

static int32_t best(const std::vector<float>& logits) {
  return static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

// What is another here than at export, a line each: the tokens of a prompt, the logits after it, the greedy answer.
// Each step follows the recorded tokens. Two logits may each move by the tolerance, so that a token binds where more
// than twice that lay between the best two.
static std::vector<std::string> replay(const Bundle& bundle, const Json& golden, const std::string& where) {
  std::vector<std::string> problems;
  const double tolerance = bundle.manifest.at("golden_logit_tolerance").value;
  const Ids ids = golden.at("ids").numbers<int32_t>(), expected = golden.at("greedy_ids").numbers<int32_t>();
  const auto margins = golden.at("margins").numbers<double>();
  if (bundle.encode(golden.at("text").string, golden.at("plain").value != 0) != ids)
    problems.push_back(where + ": other tokens than at export");
  Text text(bundle, ids.size() + expected.size() + 1);
  std::vector<float> logits = text.append(ids);
  const Ids top = golden.at("top_ids").numbers<int32_t>();
  const auto recorded = golden.at("top_logits").numbers<double>();
  for (size_t i = 0; i < top.size(); ++i)
    if (!(std::abs(logits.at(static_cast<size_t>(top[i])) - recorded[i]) <= tolerance))
      problems.push_back(where + ": another logit of token " + std::to_string(top[i]));
  for (size_t step = 0; step < expected.size(); ++step) {
    if (step > 0) logits = text.append({expected[step - 1]});
    const double margin = step < margins.size() ? margins[step] : std::numeric_limits<double>::infinity();
    if (best(logits) != expected[step] && margin > 2 * tolerance)
      problems.push_back(where + ": " + std::to_string(best(logits)) + " instead of " +
                         std::to_string(expected[step]) + " at token " + std::to_string(step));
  }
  return problems;
}

static int verify(const Bundle& bundle) {
  const auto& vectors = bundle.manifest.at("golden").items;
  size_t tokens = 0, faults = 0;
  for (size_t i = 0; i < vectors.size(); ++i) {
    tokens += vectors[i].at("greedy_ids").items.size();
    for (const std::string& problem : replay(bundle, vectors[i], "prompt " + std::to_string(i))) {
      std::cerr << problem << "\n";
      ++faults;
    }
  }
  if (vectors.empty()) throw std::runtime_error("bundle.json: has no golden vectors");
  std::cout << vectors.size() << " prompts, " << tokens << " tokens: " << (faults ? "not as exported" : "as exported") << "\n";
  return faults ? 4 : 0;
}

static int answer(const Bundle& bundle, const std::string& prompt) {
  const Ids ids = bundle.ask(prompt), stops = bundle.manifest.at("stop_ids").numbers<int32_t>();
  const size_t context = static_cast<size_t>(bundle.manifest.at("context_tokens").value);
  if (ids.empty() || ids.size() >= context) throw std::runtime_error("the prompt is empty, or longer than the context");
  OgaTokenizerStream* stream = nullptr;
  check(OgaCreateTokenizerStream(bundle.tokenizer(), &stream));
  const Owned<OgaTokenizerStream, OgaDestroyTokenizerStream> owned(stream);
  const size_t room = std::min(context, ids.size() + 512);
  Text text(bundle, room);
  std::vector<float> logits = text.append(ids);
  for (size_t length = ids.size(); length < room; ++length) {
    const int32_t token = best(logits);
    if (std::find(stops.begin(), stops.end(), token) != stops.end()) break;
    const char* piece = nullptr;
    check(OgaTokenizerStreamDecode(stream, token, &piece));
    std::cout << piece << std::flush;
    if (length + 1 < room) logits = text.append({token});
  }
  std::cout << "\n";
  return 0;
}

int main(int count, char** arguments) {
  setenv("ORT_DISABLE_TELEMETRY", "1", 0);  // before the runtime is asked for anything; "0" in the environment lets it on
  if (count != 2 && count != 3) {
    std::cerr << "bundle FOLDER [PROMPT]\n";
    return 2;
  }
  int code = 1;
  try {
    const Bundle bundle(arguments[1]);
    code = count == 2 ? verify(bundle) : answer(bundle, arguments[2]);
  } catch (const std::exception& problem) {
    std::cerr << "bundle: " << problem.what() << "\n";
  }
  OgaShutdown();
  return code;
}
