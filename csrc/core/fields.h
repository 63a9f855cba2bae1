// The members of a struct that a NamedTuple of Python fills, in its order. A struct lists them once, in `fields()`: the bindings read the
// tuple by that list (bindings/tuple_from_python.h) and give its names to the test that compares them with Python's.
#pragma once

namespace foveate {

template <class Owner, class T>
struct Field {
  const char* name;
  T Owner::*member;
};

// A field of the tuple that no kernel reads.
struct UnreadField {
  const char* name;
};

}  // namespace foveate
