// As much of JSON as a bundle's manifest needs: read as a whole, no numbers beyond a double's.
#pragma once
#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

struct Json {
  enum Kind { null, boolean, number, text, list, object } kind = null;
  double value = 0;
  std::string string;
  std::vector<Json> items;
  std::map<std::string, Json> fields;

  const Json& at(const std::string& name) const {
    const auto found = fields.find(name);
    if (found == fields.end()) throw std::runtime_error("bundle.json: no " + name);
    return found->second;
  }
  bool has(const std::string& name) const {
    const auto found = fields.find(name);
    return found != fields.end() && found->second.kind != null;
  }
  template <typename T>
  std::vector<T> numbers() const {
    std::vector<T> all;
    for (const Json& item : items) all.push_back(static_cast<T>(item.value));
    return all;
  }
};

class JsonReader {
 public:
  explicit JsonReader(const std::string& source) : at_(source.c_str()) {}

  Json read() {
    Json made;
    skip();
    if (*at_ == '{' || *at_ == '[') return nested(*at_ == '{');
    if (*at_ == '"') {
      made.kind = Json::text;
      made.string = quoted();
    } else if (word("true") || word("false") || word("null")) {
      made.kind = at_[-1] == 'l' ? Json::null : Json::boolean;  // null ends in l, true and false in e
      made.value = at_[-2] == 'u' ? 1 : 0;
    } else {
      char* end = nullptr;
      made.kind = Json::number;
      made.value = std::strtod(at_, &end);
      if (end == at_) throw std::runtime_error("bundle.json: is no JSON");
      at_ = end;
    }
    return made;
  }

 private:
  const char* at_;

  void skip() {
    while (*at_ == ' ' || *at_ == '\n' || *at_ == '\r' || *at_ == '\t') ++at_;
  }
  bool word(const std::string& wanted) {
    if (std::strncmp(at_, wanted.c_str(), wanted.size()) != 0) return false;
    at_ += wanted.size();
    return true;
  }
  Json nested(bool named) {
    Json made;
    made.kind = named ? Json::object : Json::list;
    const char close = named ? '}' : ']';
    ++at_;
    for (skip(); *at_ != close; skip()) {
      if (*at_ == '\0') throw std::runtime_error("bundle.json: ends early");
      if (*at_ == ',') {
        ++at_;
        continue;
      }
      if (named) {
        const std::string name = quoted();
        skip();
        if (*at_++ != ':') throw std::runtime_error("bundle.json: is no JSON");
        made.fields[name] = read();
      } else {
        made.items.push_back(read());
      }
    }
    ++at_;
    return made;
  }
  std::string quoted() {
    if (*at_++ != '"') throw std::runtime_error("bundle.json: is no JSON");
    std::string made;
    while (*at_ != '"') {
      if (*at_ == '\0') throw std::runtime_error("bundle.json: ends early");
      if (*at_ != '\\') {
        made += *at_++;
        continue;
      }
      const char kind = at_[1];
      at_ += 2;
      static const std::string known = "nrtbf", meant = "\n\r\t\b\f";
      const size_t place = known.find(kind);
      if (kind == 'u') {
        unsigned code = hex();
        if (code >= 0xD800 && code < 0xDC00 && at_[0] == '\\' && at_[1] == 'u') {
          at_ += 2;
          code = 0x10000 + ((code - 0xD800) << 10) + (hex() - 0xDC00);
        }
        append(made, code);
      } else {
        made += place == std::string::npos ? kind : meant[place];
      }
    }
    ++at_;
    return made;
  }
  unsigned hex() {
    const std::string digits(at_, 4);
    at_ += 4;
    return static_cast<unsigned>(std::stoul(digits, nullptr, 16));
  }
  static void append(std::string& made, unsigned code) {  // in UTF-8
    if (code < 0x80) {
      made += static_cast<char>(code);
    } else if (code < 0x800) {
      made += static_cast<char>(0xC0 | code >> 6);
      made += static_cast<char>(0x80 | (code & 63));
    } else {
      if (code < 0x10000) {
        made += static_cast<char>(0xE0 | code >> 12);
      } else {
        made += static_cast<char>(0xF0 | code >> 18);
        made += static_cast<char>(0x80 | (code >> 12 & 63));
      }
      made += static_cast<char>(0x80 | (code >> 6 & 63));
      made += static_cast<char>(0x80 | (code & 63));
    }
  }
};

inline std::string json_quoted(const std::string& text) {
  std::string made = "\"";
  for (const char letter : text) {
    static const char* digits = "0123456789abcdef";
    if (letter == '"' || letter == '\\') {
      made += '\\';
      made += letter;
    } else if (static_cast<unsigned char>(letter) < 0x20) {
      made += std::string("\\u00") + digits[letter >> 4 & 15] + digits[letter & 15];
    } else {
      made += letter;
    }
  }
  return made + "\"";
}
