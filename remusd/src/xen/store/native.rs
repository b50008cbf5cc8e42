//! What the crate xenstore-rs lacks (transactions, `XS_RESUME`, long directories), through libxenstore.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char, c_uint, c_ulong, c_void};
use std::io;

use libloading::os::unix::{Library, Symbol};

use super::{Compared, StoreError};
use crate::ids::DomId;
use crate::xen::ffi::symbol;
use crate::xen::soname;

type Handle = *mut c_void;
/// Attempts at a transaction that others' writes make fail; oxenstored and C xenstored both answer EAGAIN then.
const ATTEMPTS: u32 = 64;

struct Functions {
    close: Symbol<unsafe extern "C" fn(Handle)>,
    read: Symbol<unsafe extern "C" fn(Handle, u32, *const c_char, *mut c_uint) -> *mut c_void>,
    write: Symbol<unsafe extern "C" fn(Handle, u32, *const c_char, *const c_void, c_uint) -> bool>,
    directory: Symbol<unsafe extern "C" fn(Handle, u32, *const c_char, *mut c_uint) -> *mut *mut c_char>,
    begin: Symbol<unsafe extern "C" fn(Handle) -> u32>,
    end: Symbol<unsafe extern "C" fn(Handle, u32, bool) -> bool>,
    resume: Symbol<unsafe extern "C" fn(Handle, c_uint) -> bool>,
}

/// One connection to xenstored, for one thread. Its calls wait for xenstored.
pub(in crate::xen) struct NativeStore {
    handle: Handle,
    functions: Functions,
    _library: Library,
}

impl NativeStore {
    pub(in crate::xen) fn open() -> Result<Self, StoreError> {
        let library = |error: crate::xen::XenError| StoreError::Library { cause: error.to_string() };
        let so = soname::stable("libxenstore.so.4").map_err(library)?;
        // SAFETY: each type is the function's prototype in xenstore.h; the soname stands for this ABI.
        let (open, functions) = unsafe {
            let open: Symbol<unsafe extern "C" fn(c_ulong) -> Handle> = symbol(&so, "xs_open").map_err(library)?;
            let functions = Functions {
                close: symbol(&so, "xs_close").map_err(library)?,
                read: symbol(&so, "xs_read").map_err(library)?,
                write: symbol(&so, "xs_write").map_err(library)?,
                directory: symbol(&so, "xs_directory").map_err(library)?,
                begin: symbol(&so, "xs_transaction_start").map_err(library)?,
                end: symbol(&so, "xs_transaction_end").map_err(library)?,
                resume: symbol(&so, "xs_resume_domain").map_err(library)?,
            };
            (open, functions)
        };
        // SAFETY: no flags.
        let handle = unsafe { open(0) };
        if handle.is_null() {
            return Err(StoreError::Connect { cause: io::Error::last_os_error().to_string() });
        }
        Ok(Self { handle, functions, _library: so })
    }

    pub(in crate::xen) fn resume_domain(&mut self, domid: DomId) -> Result<(), StoreError> {
        // SAFETY: an open handle and a number.
        if unsafe { (self.functions.resume)(self.handle, domid.0) } {
            Ok(())
        } else {
            Err(failed("resume", &format!("domain {domid}")))
        }
    }

    pub(in crate::xen) fn compare_and_write(
        &mut self,
        path: &str,
        expected: Option<&str>,
        value: &str,
    ) -> Result<Compared, StoreError> {
        for _ in 0..ATTEMPTS {
            // SAFETY: an open handle.
            let transaction = unsafe { (self.functions.begin)(self.handle) };
            if transaction == 0 {
                return Err(failed("transaction-start", path));
            }
            let step = self.compare_step(transaction, path, expected, value);
            let commit = matches!(step, Ok(Compared::Written));
            // SAFETY: the transaction was begun above and is ended once.
            let ended = unsafe { (self.functions.end)(self.handle, transaction, !commit) };
            if ended || !commit {
                return step;
            }
            let error = io::Error::last_os_error();
            if error.raw_os_error() != Some(libc::EAGAIN) {
                return Err(request("transaction-end", path, &error));
            }
        }
        Err(request("transaction-end", path, &io::Error::from_raw_os_error(libc::EAGAIN)))
    }

    fn compare_step(
        &mut self,
        transaction: u32,
        path: &str,
        expected: Option<&str>,
        value: &str,
    ) -> Result<Compared, StoreError> {
        let now = self.read(transaction, path)?;
        if now.as_deref() != expected {
            return Ok(Compared::Differs(now));
        }
        let name = c_path(path)?;
        let length = c_uint::try_from(value.len())
            .map_err(|_| request("write", path, &io::Error::from_raw_os_error(libc::E2BIG)))?;
        // SAFETY: `name` ends with NUL, `value` has `length` bytes.
        let written =
            unsafe { (self.functions.write)(self.handle, transaction, name.as_ptr(), value.as_ptr().cast(), length) };
        if written { Ok(Compared::Written) } else { Err(failed("write", path)) }
    }

    fn read(&mut self, transaction: u32, path: &str) -> Result<Option<String>, StoreError> {
        let name = c_path(path)?;
        let mut length = 0;
        // SAFETY: `name` ends with NUL; the result is ours to free and has `length` bytes and a NUL.
        unsafe {
            let value = (self.functions.read)(self.handle, transaction, name.as_ptr(), &raw mut length);
            if value.is_null() {
                let error = io::Error::last_os_error();
                return match error.raw_os_error() {
                    Some(libc::ENOENT) => Ok(None),
                    _ => Err(request("read", path, &error)),
                };
            }
            let bytes = std::slice::from_raw_parts(value.cast::<u8>(), length as usize);
            let text = String::from_utf8_lossy(bytes).into_owned();
            libc::free(value);
            Ok(Some(text))
        }
    }

    /// The children of a node, however many.
    pub(in crate::xen) fn directory(&mut self, path: &str) -> Result<Vec<String>, StoreError> {
        let name = c_path(path)?;
        let mut count = 0;
        // SAFETY: `name` ends with NUL; the result is one allocation of `count` pointers to strings within it.
        unsafe {
            let list = (self.functions.directory)(self.handle, 0, name.as_ptr(), &raw mut count);
            if list.is_null() {
                return Err(failed("directory", path));
            }
            let names = std::slice::from_raw_parts(list, count as usize)
                .iter()
                .map(|entry| CStr::from_ptr(*entry).to_string_lossy().into_owned())
                .collect();
            libc::free(list.cast());
            Ok(names)
        }
    }
}

impl Drop for NativeStore {
    fn drop(&mut self) {
        // SAFETY: opened by us, closed once.
        unsafe { (self.functions.close)(self.handle) };
    }
}

fn c_path(path: &str) -> Result<CString, StoreError> {
    CString::new(path).map_err(|_| request("read", path, &io::Error::from_raw_os_error(libc::EINVAL)))
}

fn failed(what: &'static str, path: &str) -> StoreError {
    request(what, path, &io::Error::last_os_error())
}

fn request(what: &'static str, path: &str, error: &io::Error) -> StoreError {
    StoreError::Request { request: what, path: path.into(), cause: error.to_string() }
}
