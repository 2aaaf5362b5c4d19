//! How the file begins through which two processes of a host tell each other what to copy: a page of words, then the ring of chunks. What
//! follows is laid out by its owners, one behind the other.

/// Words in front of the ring, a page.
pub(super) const FRONT: usize = 512;
/// The first word of the front page that is not the ring's.
pub(super) const FRONT_OF_OTHERS: usize = 40;
/// Words of the ring of chunks.
pub(super) const RING: usize = 64 << 10;
