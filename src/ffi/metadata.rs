//! Metadata, "ip:port?gpu" or "ip:port?gpu,ip,ip", with which peers find an engine: writes it and parses it. Does not interpret the addresses.

use super::engine::uccl_engine_t;
use super::guard::{guard, optional_out_arg, out_arg, status, str_arg};
use super::handles::engines;
use crate::status::{bail, Error, ErrorKind, Result, UCCL_OK};
use std::ffi::{c_char, c_int};
use std::net::Ipv6Addr;

/// Returns the engine's metadata, "ip:port?gpu". gpu is the PCI address of the engine's GPU, or "-1" without one. Where peers find the engine at
/// other addresses too, they follow, each behind a comma; all behind the question mark is the remote_gpu of uccl_engine_connect.
///
/// @param engine    [in]  The engine.
/// @param metadata  [out] NUL-terminated text; the caller owns it and frees it with uccl_engine_free_metadata.
/// @return UCCL_OK or a negative status; on failure *metadata is unchanged.
///
/// Threads: any. C++: the overload of the same name allocates with new[]; free it with delete[].
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_get_metadata(engine: *mut uccl_engine_t, metadata: *mut *mut c_char) -> c_int {
    status(|| {
        // SAFETY: the caller passes a writable pointer or null.
        let out = unsafe { out_arg(metadata, "metadata")? };
        let text = engines().get(engine.cast())?.metadata();
        let Ok(text) = std::ffi::CString::new(text) else { bail!(Internal, "metadata holds a NUL") };
        *out = text.into_raw();
        Ok(UCCL_OK)
    })
}

/// Frees the text that uccl_engine_get_metadata returned to C.
///
/// @param metadata  The text; NULL is a no-op.
///
/// Threads: any, once per text.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_free_metadata(metadata: *mut c_char) {
    guard((), || {
        if !metadata.is_null() {
            // SAFETY: it came from CString::into_raw in uccl_engine_get_metadata.
            drop(unsafe { std::ffi::CString::from_raw(metadata) });
        }
        Ok(())
    })
}

/// Writes the engine's metadata into the caller's buffer.
///
/// @param engine  [in]  The engine.
/// @param buf     [out] NUL-terminated text. May be NULL if len is 0.
/// @param len     [in]  Size of buf in bytes.
/// @param needed  [out] Bytes needed with the NUL, also written if buf is too small. May be NULL.
/// @return UCCL_OK; UCCL_ERR_RESOURCE if buf is too small (buf is unchanged); another negative status.
///
/// Threads: any.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_metadata_into(
    engine: *mut uccl_engine_t,
    buf: *mut c_char,
    len: usize,
    needed: *mut usize,
) -> c_int {
    status(|| {
        let text = engines().get(engine.cast())?.metadata();
        // SAFETY: the caller passes writable pointers or null.
        unsafe { copy_text(&text, buf, len, needed) }
    })
}

/// Writes a text into the caller's buffer, with a NUL.
///
/// # Safety
/// `buf` is null or has `len` writable bytes; `needed` is null, badly aligned or writable.
pub(super) unsafe fn copy_text(text: &str, buf: *mut c_char, len: usize, needed: *mut usize) -> Result<c_int> {
    // SAFETY: by the caller's contract.
    if let Some(needed) = unsafe { optional_out_arg(needed, "needed")? } {
        *needed = text.len() + 1;
    }
    if len < text.len() + 1 {
        bail!(Resource, "the text needs {} bytes, the buffer has {len}", text.len() + 1);
    }
    // SAFETY: by the caller's contract.
    let out = unsafe { out_arg(buf, "buf")? } as *mut c_char;
    // SAFETY: text.len() + 1 <= len bytes are writable.
    unsafe {
        std::ptr::copy_nonoverlapping(text.as_ptr().cast(), out, text.len());
        *out.add(text.len()) = 0;
    }
    Ok(UCCL_OK)
}

/// Splits metadata into the arguments of uccl_engine_connect.
///
/// @param metadata  [in]  Text of uccl_engine_get_metadata, NUL-terminated: "ip:port?gpu". An IPv6 address before the port is in brackets.
/// @param ip_buf    [out] The address, NUL-terminated, without brackets. May be NULL.
/// @param ip_len    [in]  Size of ip_buf in bytes; 64 holds every address.
/// @param port      [out] The port, 1 to 65535. May be NULL.
/// @param gpu_buf   [out] The GPU and the other addresses, NUL-terminated, as uccl_engine_connect takes them. May be NULL.
/// @param gpu_len   [in]  Size of gpu_buf in bytes; 512 holds all that this library writes.
/// @return UCCL_OK; UCCL_ERR_INVALID_ARGUMENT for text that is not metadata; UCCL_ERR_RESOURCE if a buffer is too small. On failure
///         the outputs are unchanged.
///
/// Threads: any; needs no engine.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_parse_metadata(
    metadata: *const c_char,
    ip_buf: *mut c_char,
    ip_len: usize,
    port: *mut c_int,
    gpu_buf: *mut c_char,
    gpu_len: usize,
) -> c_int {
    status(|| {
        // SAFETY: the caller passes NUL-terminated text, and writable outputs, or null.
        let (text, port, ip_out, gpu_out) = unsafe {
            (
                str_arg(metadata, "metadata")?,
                optional_out_arg(port, "port")?,
                optional_out_arg(ip_buf, "ip_buf")?.map(|first| first as *mut c_char),
                optional_out_arg(gpu_buf, "gpu_buf")?.map(|first| first as *mut c_char),
            )
        };
        let parts = parse(text)?;
        for (what, out, len, text) in [("ip_buf", ip_out, ip_len, parts.ip), ("gpu_buf", gpu_out, gpu_len, parts.gpu)] {
            if out.is_some() && len <= text.len() {
                bail!(Resource, "{what} needs {} bytes and has {len}", text.len() + 1);
            }
        }
        for (out, text) in [(ip_out, parts.ip), (gpu_out, parts.gpu)] {
            let Some(out) = out else { continue };
            // SAFETY: the buffer has more than text.len() bytes, as was checked.
            unsafe {
                std::ptr::copy_nonoverlapping(text.as_ptr().cast(), out, text.len());
                *out.add(text.len()) = 0;
            }
        }
        if let Some(port) = port {
            *port = c_int::from(parts.port);
        }
        Ok(UCCL_OK)
    })
}

#[derive(Debug, PartialEq, Eq)]
struct Parts<'a> {
    ip: &'a str,
    port: u16,
    gpu: &'a str,
}

/// "ip:port?gpu", where ip is an address or a name, and an IPv6 address is in brackets.
fn parse(text: &str) -> Result<Parts<'_>> {
    let wrong = |what: &str| Error::new(ErrorKind::InvalidArgument, format_args!("metadata {text:?}: {what}"));
    let (place, gpu) = text.split_once('?').ok_or_else(|| wrong("no '?' before the GPU"))?;
    let (ip, port) = match place.strip_prefix('[') {
        Some(rest) => {
            let (ip, port) = rest.split_once("]:").ok_or_else(|| wrong("no \"]:\" after the address"))?;
            // A scope, such as %eth0, is for the resolver.
            if ip.split('%').next().unwrap_or_default().parse::<Ipv6Addr>().is_err() {
                return Err(wrong("no IPv6 address in the brackets"));
            }
            (ip, port)
        }
        None => {
            let (ip, port) = place.rsplit_once(':').ok_or_else(|| wrong("no ':' before the port"))?;
            // Without brackets the last group of an IPv6 address could be the port.
            if ip.contains(':') {
                return Err(wrong("an IPv6 address needs brackets"));
            }
            if ip.is_empty() || ip.contains(|c: char| c.is_whitespace() || c.is_control() || "[]/@".contains(c)) {
                return Err(wrong("no address"));
            }
            (ip, port)
        }
    };
    let digits = port.bytes().all(|b| b.is_ascii_digit());
    let port = port.parse::<u16>().ok().filter(|&port| digits && port != 0).ok_or_else(|| wrong("no port from 1 to 65535"))?;
    if gpu.is_empty() || gpu.contains(|c: char| c.is_whitespace() || c.is_control()) {
        return Err(wrong("no GPU"));
    }
    Ok(Parts { ip, port, gpu })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_is_split() {
        for (text, ip, port, gpu) in [
            ("10.0.0.1:4791?0000:4a:00.0", "10.0.0.1", 4791, "0000:4a:00.0"),
            ("127.0.0.1:1?-1", "127.0.0.1", 1, "-1"),
            ("[::1]:65535?0", "::1", 65535, "0"),
            ("[fe80::1%eth0]:80?0", "fe80::1%eth0", 80, "0"),
            ("[2001:db8::7]:80?0000:4a:00.0", "2001:db8::7", 80, "0000:4a:00.0"),
            ("node-7.example:80?1", "node-7.example", 80, "1"),
            ("10.0.0.1:80?-1,10.0.1.1,fd00::7", "10.0.0.1", 80, "-1,10.0.1.1,fd00::7"),
        ] {
            assert_eq!(parse(text), Ok(Parts { ip, port, gpu }), "{text}");
        }
    }

    #[test]
    fn invalid_metadata_is_refused() {
        for text in [
            "",
            "?",
            ":?",
            "a",
            "1.2.3.4",
            "1.2.3.4:80",
            "1.2.3.4?0",
            "1.2.3.4:?0",
            "1.2.3.4:0?0",
            "1.2.3.4:65536?0",
            "1.2.3.4:-1?0",
            "1.2.3.4:+80?0",
            "1.2.3.4: 80?0",
            "1.2.3.4:80x?0",
            "1.2.3.4:80?",
            ":80?0",
            "::1:80?0",
            "[::1]80?0",
            "[::1:80?0",
            "[]:80?0",
            "[1.2.3.4]:80?0",
            "[x]:80?0",
            "a b:80?0",
            "1.2.3.4:80?0 1",
            "1.2.3.4:80?0\n",
            "]:80?0",
            "1.2.3.4:99999999999999999999?0",
        ] {
            assert!(parse(text).is_err(), "{text:?}");
        }
    }
}
