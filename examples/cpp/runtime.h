// What this program calls of onnxruntime-genai's C interface (MIT licence), declared by hand: the pip package holds the
// library without a header. A release archive has ort_genai_c.h with all of it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

extern "C" {
struct OgaResult;
struct OgaConfig;
struct OgaModel;
struct OgaTokenizer;
struct OgaTokenizerStream;
struct OgaSequences;
struct OgaGeneratorParams;
struct OgaGenerator;
struct OgaTensor;

void OgaShutdown();
const char* OgaResultGetError(const OgaResult*);
void OgaDestroyResult(OgaResult*);
void OgaDestroyString(const char*);
OgaResult* OgaCreateModel(const char* folder, OgaModel**);
void OgaDestroyModel(OgaModel*);
OgaResult* OgaCreateTokenizer(const OgaModel*, OgaTokenizer**);
OgaResult* OgaUpdateTokenizerOptions(OgaTokenizer*, const char* const* names, const char* const* values, size_t count);
OgaResult* OgaTokenizerApplyChatTemplate(const OgaTokenizer*, const char* own_template, const char* messages,
                                         const char* tools, bool add_generation_prompt, const char** text);
OgaResult* OgaTokenizerEncode(const OgaTokenizer*, const char* text, OgaSequences*);
void OgaDestroyTokenizer(OgaTokenizer*);
OgaResult* OgaCreateTokenizerStream(const OgaTokenizer*, OgaTokenizerStream**);
OgaResult* OgaTokenizerStreamDecode(OgaTokenizerStream*, int32_t token, const char** text);  // valid until the next one
void OgaDestroyTokenizerStream(OgaTokenizerStream*);
OgaResult* OgaCreateSequences(OgaSequences**);
size_t OgaSequencesGetSequenceCount(const OgaSequences*, size_t);
const int32_t* OgaSequencesGetSequenceData(const OgaSequences*, size_t);
void OgaDestroySequences(OgaSequences*);
OgaResult* OgaCreateGeneratorParams(const OgaModel*, OgaGeneratorParams**);
OgaResult* OgaGeneratorParamsSetSearchNumber(OgaGeneratorParams*, const char* name, double);
void OgaDestroyGeneratorParams(OgaGeneratorParams*);
OgaResult* OgaCreateGenerator(const OgaModel*, const OgaGeneratorParams*, OgaGenerator**);
OgaResult* OgaGenerator_AppendTokens(OgaGenerator*, const int32_t* ids, size_t count);
OgaResult* OgaGenerator_GetLogits(OgaGenerator*, OgaTensor**);  // after the last token, float32, a copy
void OgaDestroyGenerator(OgaGenerator*);
OgaResult* OgaTensorGetShapeRank(OgaTensor*, size_t*);
OgaResult* OgaTensorGetShape(OgaTensor*, int64_t* shape, size_t rank);
OgaResult* OgaTensorGetData(OgaTensor*, void**);
void OgaDestroyTensor(OgaTensor*);
}

// A result that is an error becomes an exception.
inline void check(OgaResult* result) {
  if (result == nullptr) return;
  const std::string text = OgaResultGetError(result);
  OgaDestroyResult(result);
  throw std::runtime_error(text);
}

// An object of the runtime that is destroyed when it goes out of scope: Owned<OgaModel, OgaDestroyModel>.
template <typename T, void (*destroy)(T*)>
struct Deleter {
  void operator()(T* object) const { destroy(object); }
};
template <typename T, void (*destroy)(T*)>
using Owned = std::unique_ptr<T, Deleter<T, destroy>>;
