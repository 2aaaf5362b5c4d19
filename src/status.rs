//! The library's one error type, and its mapping to the status numbers of the C ABI. Knows nothing of sockets or CUDA.

use std::fmt;

/// Status numbers of the C ABI: 0 success, positive in progress, negative an error, grouped by what failed.
/// The numbers are fixed: a release never renumbers them.
pub type StatusCode = i32;

/// Success; for a transfer: complete, with every byte in place at the destination.
pub const UCCL_OK: StatusCode = 0;
/// Not finished yet; not an error.
pub const UCCL_IN_PROGRESS: StatusCode = 1;
/// An argument is null, out of range, outside its region, or malformed.
pub const UCCL_ERR_INVALID_ARGUMENT: StatusCode = -1;
/// No such engine, connection, region or transfer; it never existed or was destroyed.
pub const UCCL_ERR_NOT_FOUND: StatusCode = -2;
/// Memory, file descriptors or another resource ran out, or a limit of the library was reached.
pub const UCCL_ERR_RESOURCE: StatusCode = -3;
/// The operation is not supported in this configuration.
pub const UCCL_ERR_UNSUPPORTED: StatusCode = -4;
/// The application closed the object while the operation was waiting or in flight.
pub const UCCL_ERR_CANCELED: StatusCode = -5;
/// A deadline passed (see the UCCL_TCPX_*_TIMEOUT_MS variables).
pub const UCCL_ERR_TIMED_OUT: StatusCode = -10;
/// The peer cannot be reached.
pub const UCCL_ERR_UNREACHABLE: StatusCode = -11;
/// The connection is lost: the peer died, closed it, or the network failed.
pub const UCCL_ERR_REMOTE_DISCONNECT: StatusCode = -12;
/// The peer does not have the pre-shared key.
pub const UCCL_ERR_AUTH: StatusCode = -13;
/// The peer does not speak this protocol, or violated it.
pub const UCCL_ERR_PROTOCOL: StatusCode = -14;
/// The peer refused the access: unknown or deregistered region, wrong token, or out of bounds.
pub const UCCL_ERR_REMOTE_ACCESS: StatusCode = -20;
/// The message is larger than the posted receive; both engines get this status.
pub const UCCL_ERR_TRUNCATED: StatusCode = -21;
/// The NCCL net plugin cannot be found or loaded.
pub const UCCL_ERR_PLUGIN_LOAD: StatusCode = -30;
/// The NCCL net plugin returned an error.
pub const UCCL_ERR_PLUGIN: StatusCode = -31;
/// A CUDA call failed, or no usable GPU was found.
pub const UCCL_ERR_GPU: StatusCode = -32;
/// A system call failed.
pub const UCCL_ERR_SYSTEM: StatusCode = -33;
/// A bug in the library. Please report it.
pub const UCCL_ERR_INTERNAL: StatusCode = -99;

/// The kind of an error; [`Error`] carries the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[allow(missing_docs)] // each is documented at its UCCL_ERR_* number
pub enum ErrorKind {
    InvalidArgument,
    NotFound,
    Resource,
    Unsupported,
    Canceled,
    TimedOut,
    Unreachable,
    RemoteDisconnect,
    Auth,
    Protocol,
    RemoteAccess,
    Truncated,
    PluginLoad,
    Plugin,
    Gpu,
    System,
    Internal,
}

impl ErrorKind {
    /// Every kind, for tables and tests.
    pub const ALL: [ErrorKind; 17] = [
        ErrorKind::InvalidArgument,
        ErrorKind::NotFound,
        ErrorKind::Resource,
        ErrorKind::Unsupported,
        ErrorKind::Canceled,
        ErrorKind::TimedOut,
        ErrorKind::Unreachable,
        ErrorKind::RemoteDisconnect,
        ErrorKind::Auth,
        ErrorKind::Protocol,
        ErrorKind::RemoteAccess,
        ErrorKind::Truncated,
        ErrorKind::PluginLoad,
        ErrorKind::Plugin,
        ErrorKind::Gpu,
        ErrorKind::System,
        ErrorKind::Internal,
    ];

    /// The status number of the C ABI.
    pub const fn code(self) -> StatusCode {
        match self {
            ErrorKind::InvalidArgument => UCCL_ERR_INVALID_ARGUMENT,
            ErrorKind::NotFound => UCCL_ERR_NOT_FOUND,
            ErrorKind::Resource => UCCL_ERR_RESOURCE,
            ErrorKind::Unsupported => UCCL_ERR_UNSUPPORTED,
            ErrorKind::Canceled => UCCL_ERR_CANCELED,
            ErrorKind::TimedOut => UCCL_ERR_TIMED_OUT,
            ErrorKind::Unreachable => UCCL_ERR_UNREACHABLE,
            ErrorKind::RemoteDisconnect => UCCL_ERR_REMOTE_DISCONNECT,
            ErrorKind::Auth => UCCL_ERR_AUTH,
            ErrorKind::Protocol => UCCL_ERR_PROTOCOL,
            ErrorKind::RemoteAccess => UCCL_ERR_REMOTE_ACCESS,
            ErrorKind::Truncated => UCCL_ERR_TRUNCATED,
            ErrorKind::PluginLoad => UCCL_ERR_PLUGIN_LOAD,
            ErrorKind::Plugin => UCCL_ERR_PLUGIN,
            ErrorKind::Gpu => UCCL_ERR_GPU,
            ErrorKind::System => UCCL_ERR_SYSTEM,
            ErrorKind::Internal => UCCL_ERR_INTERNAL,
        }
    }

    /// The kind of a status number, as a peer sends it; unknown numbers become `Internal`.
    pub fn from_code(code: StatusCode) -> ErrorKind {
        ErrorKind::ALL.into_iter().find(|k| k.code() == code).unwrap_or(ErrorKind::Internal)
    }

    /// A short text for the number.
    pub const fn describe(self) -> &'static std::ffi::CStr {
        match self {
            ErrorKind::InvalidArgument => c"invalid argument",
            ErrorKind::NotFound => c"no such engine, connection, region or transfer",
            ErrorKind::Resource => c"out of resources",
            ErrorKind::Unsupported => c"not supported in this configuration",
            ErrorKind::Canceled => c"closed by the application",
            ErrorKind::TimedOut => c"deadline passed",
            ErrorKind::Unreachable => c"peer unreachable",
            ErrorKind::RemoteDisconnect => c"connection lost",
            ErrorKind::Auth => c"authentication failed",
            ErrorKind::Protocol => c"protocol violation by the peer",
            ErrorKind::RemoteAccess => c"remote access refused",
            ErrorKind::Truncated => c"message larger than the posted receive",
            ErrorKind::PluginLoad => c"network plugin cannot be loaded",
            ErrorKind::Plugin => c"network plugin error",
            ErrorKind::Gpu => c"GPU error",
            ErrorKind::System => c"system call failed",
            ErrorKind::Internal => c"internal error",
        }
    }
}

/// An error with its cause as text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    kind: ErrorKind,
    message: Box<str>,
}

impl From<process::Parents> for Error {
    fn from(parents: process::Parents) -> Error {
        Error::new(ErrorKind::Unsupported, format_args!("{parents}"))
    }
}

impl Error {
    /// An error of `kind` with a message for people.
    pub fn new(kind: ErrorKind, message: impl fmt::Display) -> Error {
        Error { kind, message: message.to_string().into() }
    }
    /// A failed system call: `what` names the call and its object.
    pub fn system(what: impl fmt::Display, source: &std::io::Error) -> Error {
        Error::new(ErrorKind::System, format_args!("{what}: {source}"))
    }
    /// The cause as text.
    pub fn to_str(&self) -> &str {
        &self.message
    }
    /// The kind of the error.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
    /// The status number of the C ABI.
    pub fn code(&self) -> StatusCode {
        self.kind.code()
    }
}

/// Result with the library's error.
pub type Result<T> = std::result::Result<T, Error>;

macro_rules! bail {
    ($kind:ident, $($arg:tt)*) => {
        return Err($crate::status::Error::new($crate::status::ErrorKind::$kind, format_args!($($arg)*)))
    };
}
pub(crate) use bail;

macro_rules! err {
    ($kind:ident, $($arg:tt)*) => {
        $crate::status::Error::new($crate::status::ErrorKind::$kind, format_args!($($arg)*))
    };
}
pub(crate) use err;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_distinct_and_round_trip() {
        let mut seen = std::collections::HashSet::new();
        for kind in ErrorKind::ALL {
            assert!(kind.code() < 0, "{kind:?}");
            assert!(seen.insert(kind.code()), "{kind:?} shares its number");
            assert_eq!(ErrorKind::from_code(kind.code()), kind);
            assert!(!kind.describe().is_empty());
        }
        assert_eq!(ErrorKind::from_code(12345), ErrorKind::Internal);
    }
}
