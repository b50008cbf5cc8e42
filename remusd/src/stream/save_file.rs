//! xl's own head before the libxl stream: which domain configuration belongs to it (xl_migrate.c, xl_saverestore.c).

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::error::StreamError;

/// Bytes of the fixed part.
pub const HEADER: usize = 48;
/// Longest optional part accepted; a real configuration has some KiB.
pub const OPTIONAL_MAX: usize = 4 << 20;
const MAGIC: &[u8; 32] = b"Xen saved domain, xl format\n \0 \r";
const BYTE_ORDER: u32 = 0x0102_0304;
/// The configuration is JSON.
const FLAG_JSON: u32 = 1;
/// A libxl stream of version 2 follows.
const FLAG_STREAM_V2: u32 = 2;

/// Head and configuration as `xl migrate` sends them.
///
/// # Errors
/// [`StreamError::Config`] for a configuration above [`OPTIONAL_MAX`].
pub fn head(config_json: &str) -> Result<Bytes, StreamError> {
    // xl counts the NUL that ends the text.
    let config = config_json.len() + 1;
    if config + 4 > OPTIONAL_MAX {
        return Err(StreamError::Config(format!("{config} bytes long")));
    }
    let mut buffer = BytesMut::with_capacity(HEADER + 4 + config);
    buffer.put_slice(MAGIC);
    buffer.put_u32_ne(BYTE_ORDER);
    buffer.put_u32_ne(FLAG_JSON | FLAG_STREAM_V2);
    buffer.put_u32_ne(0);
    buffer.put_u32_ne(config as u32 + 4);
    buffer.put_u32_ne(config as u32);
    buffer.put_slice(config_json.as_bytes());
    buffer.put_u8(0);
    Ok(buffer.freeze())
}

/// Checks the fixed part; returns how many bytes of optional part follow.
///
/// # Errors
/// [`StreamError`] for other data, another byte order, or anything that needs what we do not know.
pub fn check_header(bytes: &Bytes) -> Result<usize, StreamError> {
    let mut head = bytes.clone();
    if head.len() < HEADER {
        return Err(StreamError::Truncated { within: "xl's header" });
    }
    let magic = head.split_to(MAGIC.len());
    if magic.as_ref() != MAGIC {
        return Err(StreamError::Magic {
            expected: "a domain saved or sent by xl",
            found: magic.escape_ascii().to_string(),
        });
    }
    let (order, mandatory, _optional, length) =
        (head.get_u32_ne(), head.get_u32_ne(), head.get_u32_ne(), head.get_u32_ne() as usize);
    if order != BYTE_ORDER {
        return Err(StreamError::Unsupported { feature: format!("byte order {order:#x}") });
    }
    if mandatory != FLAG_JSON | FLAG_STREAM_V2 {
        return Err(StreamError::Unsupported {
            feature: format!("xl's flags {mandatory:#x} (3 is a JSON configuration and a stream of version 2)"),
        });
    }
    if length > OPTIONAL_MAX {
        return Err(StreamError::Config(format!("{length} bytes long")));
    }
    Ok(length)
}

/// The configuration out of the optional part.
///
/// # Errors
/// [`StreamError::Config`] when there is none, or it is not text.
pub fn config(optional: &Bytes) -> Result<String, StreamError> {
    let bad = |reason: &str| StreamError::Config(reason.into());
    if optional.len() < 4 {
        return Err(bad("it is missing"));
    }
    let mut rest = optional.clone();
    let length = rest.get_u32_ne() as usize;
    if length == 0 || length > rest.len() {
        return Err(bad("its length does not fit"));
    }
    let text = rest.split_to(length);
    let text = text.strip_suffix(&[0]).unwrap_or(&text);
    if text.contains(&0) {
        return Err(bad("it contains a NUL"));
    }
    Ok(std::str::from_utf8(text).map_err(|error| StreamError::Config(error.to_string()))?.to_owned())
}

/// A domain's configuration for a receiver: `c_info.domid` becomes 0, as the receiver would else ask Xen for that very id.
///
/// # Errors
/// [`StreamError::Config`] for anything but a JSON object with a `c_info`.
pub fn config_for_receiver(config_json: &str) -> Result<String, StreamError> {
    let mut config: serde_json::Value =
        serde_json::from_str(config_json).map_err(|error| StreamError::Config(error.to_string()))?;
    let Some(create) = config.get_mut("c_info").and_then(|info| info.as_object_mut()) else {
        return Err(StreamError::Config("it has no c_info".into()));
    };
    create.insert("domid".into(), 0.into());
    serde_json::to_string_pretty(&config).map_err(|error| StreamError::Config(error.to_string()))
}
