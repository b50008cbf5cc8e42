//! Little-endian fields with bounds: reading never trusts a length, writing never exceeds one.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use uuid::Uuid;

/// Longest text on the wire in bytes. Longer ones are cut by the sender: they are for people.
pub(super) const MAX_TEXT: usize = 4096;

/// Reads the fields of one payload. Errors are the broken rule's name.
pub(super) struct Fields(pub(super) Bytes);

pub(super) type Field<T> = Result<T, &'static str>;

macro_rules! number {
    ($name:ident, $type:ty, $get:ident) => {
        pub(super) fn $name(&mut self) -> Field<$type> {
            if self.0.len() < size_of::<$type>() {
                return Err("it is too short");
            }
            Ok(self.0.$get())
        }
    };
}

impl Fields {
    number!(u8, u8, get_u8);
    number!(u16, u16, get_u16_le);
    number!(u32, u32, get_u32_le);
    number!(u64, u64, get_u64_le);
    number!(u128, u128, get_u128_le);

    pub(super) fn bool(&mut self) -> Field<bool> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err("a flag is neither 0 nor 1"),
        }
    }

    pub(super) fn uuid(&mut self) -> Field<Uuid> {
        let raw = self.take(16)?;
        Uuid::from_slice(&raw).map_err(|_| "a uuid is too short")
    }

    /// Some value if the presence byte is 1; the value's bytes are there only then.
    pub(super) fn option<T>(&mut self, value: impl FnOnce(&mut Self) -> Field<T>) -> Field<Option<T>> {
        if self.bool()? { value(self).map(Some) } else { Ok(None) }
    }

    pub(super) fn text(&mut self) -> Field<String> {
        let length = usize::from(self.u16()?);
        if length > MAX_TEXT {
            return Err("a text is too long");
        }
        let raw = self.take(length)?;
        String::from_utf8(raw.to_vec()).map_err(|_| "a text is not UTF-8")
    }

    pub(super) fn take(&mut self, length: usize) -> Field<Bytes> {
        if self.0.len() < length {
            return Err("it is too short");
        }
        Ok(self.0.split_to(length))
    }

    pub(super) fn rest(&mut self) -> Bytes {
        std::mem::take(&mut self.0)
    }

    pub(super) fn end(&self) -> Field<()> {
        if self.0.is_empty() { Ok(()) } else { Err("bytes are left over") }
    }
}

/// Writes a text: u16 length and UTF-8 bytes, cut at [`MAX_TEXT`].
pub(super) fn put_text(out: &mut BytesMut, text: &str) {
    let mut end = text.len().min(MAX_TEXT);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    out.put_u16_le(end as u16);
    out.put_slice(&text.as_bytes()[..end]);
}

pub(super) fn put_bool(out: &mut BytesMut, value: bool) {
    out.put_u8(u8::from(value));
}

/// Writes a presence byte and, if there is one, the value.
pub(super) fn put_option<T>(out: &mut BytesMut, value: Option<T>, put: impl FnOnce(&mut BytesMut, T)) {
    put_bool(out, value.is_some());
    if let Some(value) = value {
        put(out, value);
    }
}
