// Whether this process was forked since an object was made. Threads do not survive a fork and locks may be held by ones that did not,
// so what a child inherits can only be left alone. Knows nothing of backends.
//
// SPDX-License-Identifier: Apache-2.0

#pragma once

namespace tcpx {

/// A mark of the process that made it.
class Birth {
 public:
  Birth();
  /// The object that holds this mark came into this process by fork.
  bool inherited() const;

 private:
  unsigned generation_;
};

}  // namespace tcpx
