//! The messages between libxl and `libxl-save-helper` (tools/libs/light/libxl_save_msgs_gen.pl, the same from Xen 4.14 to 4.22).
//!
//! Helper to us: `u16` length, `u16` message number, arguments packed in native byte order; a string is a `u32` length that counts
//! its NUL, and its bytes. Us to helper: a bare `i32` for each message that wants a reply.

use bytes::{Buf, Bytes, BytesMut};

use super::engine::EngineCall;

/// Message numbers; the callbacks' numbers are also the bits of the helper's `cbflags` argument.
mod number {
    pub(super) const LOG: u16 = 1;
    pub(super) const PROGRESS: u16 = 2;
    pub(super) const SUSPEND: u16 = 3;
    pub(super) const POSTCOPY: u16 = 4;
    pub(super) const CHECKPOINT: u16 = 5;
    pub(super) const SWITCH_QEMU_LOGDIRTY: u16 = 7;
    pub(super) const COMPLETE: u16 = 10;
}

/// The callbacks that a Remus save needs: suspend, postcopy, checkpoint, switch_qemu_logdirty.
pub(super) const CALLBACK_FLAGS: u32 =
    1 << number::SUSPEND | 1 << number::POSTCOPY | 1 << number::CHECKPOINT | 1 << number::SWITCH_QEMU_LOGDIRTY;

/// Takes the first message off `buffer`; `None` if it is not complete yet.
///
/// # Errors
/// A sentence about a message that is not as it must be.
pub fn decode(buffer: &mut BytesMut) -> Result<Option<EngineCall>, String> {
    let Some(&[low, high]) = buffer.first_chunk::<2>() else {
        return Ok(None);
    };
    let length = usize::from(u16::from_ne_bytes([low, high]));
    if buffer.len() < 2 + length {
        return Ok(None);
    }
    buffer.advance(2);
    let mut body = buffer.split_to(length).freeze();
    let call = message(&mut body)?;
    if body.is_empty() { Ok(Some(call)) } else { Err(format!("{} bytes too many after {call:?}", body.len())) }
}

fn message(body: &mut Bytes) -> Result<EngineCall, String> {
    let short = |_| "a message is too short".to_owned();
    Ok(match body.try_get_u16_ne().map_err(short)? {
        number::LOG => {
            let level = body.try_get_u32_ne().map_err(short)?;
            // Two's complement: the helper sends an int.
            let errno = body.try_get_u32_ne().map_err(short)?.cast_signed();
            let context = string(body)?;
            let text = string(body)?;
            let mut line = format!("{context}: {text}");
            if errno > 0 {
                let cause = std::io::Error::from_raw_os_error(errno);
                line = format!("{line}: {cause}");
            }
            EngineCall::Log { level, text: line }
        }
        number::PROGRESS => {
            let context = string(body)?;
            let doing = string(body)?;
            EngineCall::Progress {
                what: if doing.is_empty() { context } else { doing },
                done: body.try_get_u64_ne().map_err(short)?,
                total: body.try_get_u64_ne().map_err(short)?,
            }
        }
        number::SUSPEND => EngineCall::Suspend,
        number::POSTCOPY => EngineCall::Postcopy,
        number::CHECKPOINT => EngineCall::Checkpoint,
        number::SWITCH_QEMU_LOGDIRTY => {
            body.try_get_u32_ne().map_err(short)?;
            EngineCall::SwitchQemuLogdirty { enable: body.try_get_u32_ne().map_err(short)? != 0 }
        }
        number::COMPLETE => EngineCall::Complete {
            retval: body.try_get_i32_ne().map_err(short)?,
            errno: body.try_get_i32_ne().map_err(short)?,
        },
        other => return Err(format!("unknown message {other}")),
    })
}

fn string(body: &mut Bytes) -> Result<String, String> {
    let length = body.try_get_u32_ne().map_err(|_| "a string's length is missing".to_owned())? as usize;
    if length == 0 {
        // A null pointer in the helper.
        return Ok(String::new());
    }
    if length > body.len() {
        return Err(format!("a string of {length} bytes in {}", body.len()));
    }
    let bytes = body.split_to(length);
    let text = bytes.strip_suffix(&[0]).ok_or_else(|| "a string without its NUL".to_owned())?;
    Ok(String::from_utf8_lossy(text).into_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The first bytes of Debian's libxl-save-helper 4.17.7 on a machine without Xen.
    const REAL: &[u8] = b"\x32\x00\x01\x00\x01\x00\x00\x00\x00\x00\x00\x00\x12\x00\x00\x00libxl-save-helper\x00\x0e\x00\x00\x00starting save\x00";

    #[test]
    fn decodes_the_real_helpers_first_message() {
        let mut buffer = BytesMut::from(REAL);
        assert_eq!(
            decode(&mut buffer).unwrap(),
            Some(EngineCall::Log { level: 1, text: "libxl-save-helper: starting save".into() })
        );
        assert!(buffer.is_empty());
    }

    #[test]
    fn waits_for_a_whole_message() {
        for cut in 0..REAL.len() {
            let mut buffer = BytesMut::from(&REAL[..cut]);
            assert_eq!(decode(&mut buffer).unwrap(), None);
            assert_eq!(buffer.len(), cut, "nothing was consumed");
        }
    }

    #[test]
    fn decodes_calls() {
        let bytes = b"\x02\x00\x03\x00\x02\x00\x04\x00\x02\x00\x05\x00\
            \x0a\x00\x07\x00\x05\x00\x00\x00\x01\x00\x00\x00\
            \x0a\x00\x0a\x00\xff\xff\xff\xff\x16\x00\x00\x00";
        let mut buffer = BytesMut::from(&bytes[..]);
        let mut calls = Vec::new();
        while let Some(call) = decode(&mut buffer).unwrap() {
            calls.push(call);
        }
        assert_eq!(
            calls,
            [
                EngineCall::Suspend,
                EngineCall::Postcopy,
                EngineCall::Checkpoint,
                EngineCall::SwitchQemuLogdirty { enable: true },
                EngineCall::Complete { retval: -1, errno: 22 }
            ]
        );
        assert!(calls.iter().all(EngineCall::wants_reply));
    }

    #[test]
    fn refuses_what_does_not_fit() {
        for bytes in [
            &b"\x00\x00"[..],
            b"\x02\x00\x63\x00",
            b"\x03\x00\x03\x00\x00",
            b"\x06\x00\x02\x00\xff\xff\xff\x7f",
            b"\x07\x00\x02\x00\x01\x00\x00\x00x",
        ] {
            assert!(decode(&mut BytesMut::from(bytes)).is_err(), "{bytes:?}");
        }
    }

    #[test]
    fn the_flags_are_those_of_libxl() {
        assert_eq!(CALLBACK_FLAGS, 184);
    }

    proptest! {
        #[test]
        fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut buffer = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = decode(&mut buffer) {}
        }
    }
}
