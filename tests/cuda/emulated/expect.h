// The little that these tests need of a test framework.
#pragma once

#include <functional>
#include <iostream>
#include <stdexcept>
#include <string>

namespace moetrain::test {

inline void expect(bool condition, const std::string& message) {
    if (!condition) throw std::runtime_error(message);
}

// Runs `body`, which must throw an `Error` whose text contains `text`.
template <class Error>
void expect_throws(const std::string& text, const std::function<void()>& body) {
    try {
        body();
    } catch (const Error& error) {
        expect(std::string(error.what()).find(text) != std::string::npos,
               "expected an error with \"" + text + "\", got \"" + error.what() + "\"");
        return;
    }
    throw std::runtime_error("expected an error with \"" + text + "\", got none");
}

// Counts failures instead of stopping at the first.
class Runner {
 public:
    void run(const std::string& name, const std::function<void()>& body) {
        try {
            body();
            std::cout << "ok    " << name << std::endl;
        } catch (const std::exception& error) {
            std::cout << "FAIL  " << name << "\n      " << error.what() << std::endl;
            ++num_failures_;
        }
    }
    int exit_code() const { return num_failures_ == 0 ? 0 : 1; }

 private:
    int num_failures_ = 0;
};

}  // namespace moetrain::test
