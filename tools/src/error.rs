//! The tools' error: a sentence for people.

use std::fmt;

/// The error text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure(String);

/// Result of everything in the tools that can fail.
pub type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    /// A failure with this text.
    pub fn new(text: impl fmt::Display) -> Failure {
        Failure(text.to_string())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Failure {}

/// Adds what the program was doing when an error occurred.
pub trait Context<T> {
    /// Puts `what` in front of the error's own text.
    fn context(self, what: impl fmt::Display) -> Result<T>;
}

impl<T, E: fmt::Display> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl fmt::Display) -> Result<T> {
        self.map_err(|e| Failure(format!("{what}: {e}")))
    }
}

/// Returns a [`Failure`] with this text from the function.
#[macro_export]
macro_rules! fail {
    ($($arg:tt)*) => {
        return Err($crate::error::Failure::new(format_args!($($arg)*)))
    };
}
