//! The one error type of the CUDA driver: a call that failed, or a driver that cannot be used.

use crate::codes;
use std::fmt;

/// What went wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// No call was made: the driver is missing, sees no GPU, or fails.
    Unavailable(String),
    /// A call failed.
    Call {
        /// The function's name.
        call: &'static str,
        /// The driver's number.
        code: u32,
        /// The driver's text for it.
        text: &'static str,
    },
    /// A request that no driver can fulfil.
    Invalid(String),
}

/// The result of most functions of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// The driver's number, 0 if no call was made.
    pub fn code(&self) -> u32 {
        match self {
            Error::Call { code, .. } => *code,
            _ => 0,
        }
    }

    /// Memory ran out.
    pub fn out_of_memory(&self) -> bool {
        self.code() == codes::ERROR_OUT_OF_MEMORY
    }

    /// The context is destroyed or permanently broken: the driver has ended all its work, so nothing touches memory.
    pub fn context_is_dead(&self) -> bool {
        codes::FATAL.contains(&self.code())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Unavailable(why) => write!(f, "no GPU can be used: {why}"),
            Error::Call { call, code, text } => write!(f, "{call}: {text} ({code})"),
            Error::Invalid(what) => f.write_str(what),
        }
    }
}

impl std::error::Error for Error {}
