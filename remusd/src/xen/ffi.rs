//! What the crate xenctrl does not wrap, bound with the C ABI by versioned soname (signatures: Xen 4.16 to 4.22).
#![allow(unsafe_code)]

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::io;

use libloading::os::unix::{Library, Symbol};

use super::domain::{DomainState, ShutdownReason};
use super::hypervisor::XenError;
use super::soname;
use crate::ids::DomId;

/// `xc_interface *`: opaque.
pub(super) type Xch = *mut c_void;

/// Room for `xc_domaininfo_t` of any version: 4.17's has 152 bytes, and its tail grows.
const DOMAIN_INFO: usize = 1024;
const SHADOW_OP_OFF: c_uint = 0;
const SHADOW_OP_ENABLE_LOGDIRTY: c_uint = 2;
const VERSION_EXTRA: c_int = 1;
const EXTRA_LENGTH: usize = 16;

/// The functions, each with its library's own type.
struct Functions {
    close: Symbol<unsafe extern "C" fn(Xch) -> c_int>,
    shutdown: Symbol<unsafe extern "C" fn(Xch, u32, c_int) -> c_int>,
    destroy: Symbol<unsafe extern "C" fn(Xch, u32) -> c_int>,
    info: Symbol<unsafe extern "C" fn(Xch, u32, c_uint, *mut c_void) -> c_int>,
    hvm_param_get: Symbol<unsafe extern "C" fn(Xch, u32, u32, *mut u64) -> c_int>,
    hvm_context: Symbol<unsafe extern "C" fn(Xch, u32, *mut u8, u32) -> c_int>,
    shadow: Symbol<unsafe extern "C" fn(Xch, u32, c_uint, *mut c_uint, c_uint) -> c_int>,
    version: Symbol<unsafe extern "C" fn(Xch, c_int, *mut c_void) -> c_int>,
    resume: Symbol<unsafe extern "C" fn(Xch, u32, c_int) -> c_int>,
}

/// What the beginning of `xc_domaininfo_t` says.
#[derive(Clone, Copy, Debug)]
pub(super) struct InfoHead {
    /// Its state.
    pub(super) state: DomainState,
    /// Pages that it holds.
    pub(super) pages: u64,
    /// Of these, pages shared with other domains.
    pub(super) shared: u64,
    /// Pages that were moved to a pager.
    pub(super) paged: u64,
}

/// One `xc_interface`, for one thread.
pub(super) struct Control {
    xch: Xch,
    functions: Functions,
    // After the symbols that live in them.
    _guest: Library,
    _control: Library,
}

impl Control {
    /// Opens libxenctrl and libxenguest of the running version, and the hypervisor interface.
    pub(super) fn open() -> Result<Self, XenError> {
        let control = soname::versioned("libxenctrl")?;
        let guest = soname::versioned("libxenguest")?;
        // SAFETY: each type is the function's prototype in xenctrl.h or xenguest.h of 4.17, unchanged from 4.16 to 4.22.
        let (open, functions) = unsafe {
            let open: Symbol<unsafe extern "C" fn(*mut c_void, *mut c_void, c_uint) -> Xch> =
                symbol(&control, "xc_interface_open")?;
            let functions = Functions {
                close: symbol(&control, "xc_interface_close")?,
                shutdown: symbol(&control, "xc_domain_shutdown")?,
                destroy: symbol(&control, "xc_domain_destroy")?,
                info: symbol(&control, "xc_domain_getinfolist")?,
                hvm_param_get: symbol(&control, "xc_hvm_param_get")?,
                hvm_context: symbol(&control, "xc_domain_hvm_getcontext")?,
                shadow: symbol(&control, "xc_shadow_control")?,
                version: symbol(&control, "xc_version")?,
                resume: symbol(&guest, "xc_domain_resume")?,
            };
            (open, functions)
        };
        // SAFETY: null loggers are allowed: the library then logs to stderr.
        let xch = unsafe { open(std::ptr::null_mut(), std::ptr::null_mut(), 0) };
        if xch.is_null() {
            return Err(XenError::Open { cause: io::Error::last_os_error().to_string() });
        }
        Ok(Self { xch, functions, _guest: guest, _control: control })
    }

    /// The interface, for calls of another module on the same thread. Lives as long as this.
    pub(super) fn interface(&self) -> Xch {
        self.xch
    }

    /// A domain's state; `None` if it does not exist. The one thing that the guard needs to know without the crate.
    pub(super) fn state(&self, domid: DomId) -> Result<Option<DomainState>, XenError> {
        Ok(self.head(domid)?.map(|head| head.state))
    }

    /// The part of `xc_domaininfo_t` that is the same in all versions; `None` if there is no such domain.
    pub(super) fn head(&self, domid: DomId) -> Result<Option<InfoHead>, XenError> {
        // Of u64 for its alignment.
        let mut info = [0u64; DOMAIN_INFO / 8];
        // SAFETY: room for one element of any version's size is there.
        let found = unsafe { (self.functions.info)(self.xch, domid.0, 1, info.as_mut_ptr().cast()) };
        if found < 0 {
            let error = io::Error::last_os_error();
            if error.raw_os_error() == Some(libc::ESRCH) {
                return Ok(None);
            }
            return Err(failed("xc_domain_getinfolist", domid, &error));
        }
        // domid: u16 at 0, flags: u32 at 4. Until 4.17 a missing domain yields the next one.
        let head = info[0].to_le_bytes();
        if found == 0 || u32::from(u16::from_le_bytes([head[0], head[1]])) != domid.0 {
            return Ok(None);
        }
        let state = state_of_flags(u32::from_le_bytes([head[4], head[5], head[6], head[7]]));
        // u64 each: tot_pages at 8, max_pages, outstanding_pages, shr_pages at 32, paged_pages at 40.
        Ok(Some(InfoHead { state, pages: info[1], shared: info[4], paged: info[5] }))
    }

    /// Resumes a suspended domain; nothing to do for one that is not shut down. Returns whether it stood.
    pub(super) fn resume_fast(&self, domid: DomId) -> Result<bool, XenError> {
        match self.state(domid)? {
            None => return Err(XenError::NoDomain { domid }),
            Some(state) if state.shutdown.is_none() => return Ok(false),
            Some(_) => {}
        }
        // SAFETY: an open interface and plain numbers.
        let rc = unsafe { (self.functions.resume)(self.xch, domid.0, 1) };
        check("xc_domain_resume", domid, rc)?;
        Ok(true)
    }

    pub(super) fn shutdown(&self, domid: DomId, reason: ShutdownReason) -> Result<(), XenError> {
        // SAFETY: an open interface and plain numbers.
        let rc = unsafe { (self.functions.shutdown)(self.xch, domid.0, c_int::from(reason.code())) };
        check("xc_domain_shutdown", domid, rc)
    }

    pub(super) fn destroy(&self, domid: DomId) -> Result<(), XenError> {
        // SAFETY: an open interface and plain numbers.
        let rc = unsafe { (self.functions.destroy)(self.xch, domid.0) };
        check("xc_domain_destroy", domid, rc)
    }

    pub(super) fn hvm_param(&self, domid: DomId, param: u32) -> Result<u64, XenError> {
        let mut value = 0;
        // SAFETY: the value is ours and outlives the call.
        let rc = unsafe { (self.functions.hvm_param_get)(self.xch, domid.0, param, &raw mut value) };
        check("xc_hvm_param_get", domid, rc)?;
        Ok(value)
    }

    pub(super) fn hvm_context(&self, domid: DomId) -> Result<Vec<u8>, XenError> {
        const CALL: &str = "xc_domain_hvm_getcontext";
        // SAFETY: without a buffer the call returns the size that it needs.
        let size = unsafe { (self.functions.hvm_context)(self.xch, domid.0, std::ptr::null_mut(), 0) };
        check(CALL, domid, size)?;
        let mut buffer = vec![0; size.unsigned_abs() as usize];
        let length = size.unsigned_abs();
        // SAFETY: the buffer has `length` bytes.
        let used = unsafe { (self.functions.hvm_context)(self.xch, domid.0, buffer.as_mut_ptr(), length) };
        check(CALL, domid, used)?;
        buffer.truncate(used.unsigned_abs() as usize);
        Ok(buffer)
    }

    fn shadow(&self, domid: DomId, operation: c_uint) -> c_int {
        // SAFETY: OFF and ENABLE_LOGDIRTY take neither memory size (null) nor mode.
        unsafe { (self.functions.shadow)(self.xch, domid.0, operation, std::ptr::null_mut(), 0) }
    }

    pub(super) fn log_dirty_off(&self, domid: DomId) -> Result<(), XenError> {
        let rc = self.shadow(domid, SHADOW_OP_OFF);
        check("xc_shadow_control(OFF)", domid, rc)
    }

    /// Has writes logged from now on, with an empty log.
    pub(super) fn log_dirty_start(&self, domid: DomId) -> Result<(), XenError> {
        const CALL: &str = "xc_shadow_control(ENABLE_LOGDIRTY)";
        if self.shadow(domid, SHADOW_OP_ENABLE_LOGDIRTY) == 0 {
            return Ok(());
        }
        // On already, left by an earlier run: off and on empties the log, as libxenguest does it.
        self.log_dirty_off(domid)?;
        let rc = self.shadow(domid, SHADOW_OP_ENABLE_LOGDIRTY);
        check(CALL, domid, rc)
    }

    pub(super) fn log_dirty_is_on(&self, domid: DomId) -> Result<bool, XenError> {
        if self.shadow(domid, SHADOW_OP_ENABLE_LOGDIRTY) == 0 {
            self.log_dirty_off(domid)?;
            return Ok(false);
        }
        let error = io::Error::last_os_error();
        // Xen: EINVAL when it is on already.
        if error.raw_os_error() == Some(libc::EINVAL) {
            return Ok(true);
        }
        Err(failed("xc_shadow_control(ENABLE_LOGDIRTY)", domid, &error))
    }

    /// Major, minor, and the extra text.
    pub(super) fn version(&self) -> Result<(u32, u32, String), XenError> {
        // SAFETY: version 0 takes no argument.
        let number = unsafe { (self.functions.version)(self.xch, 0, std::ptr::null_mut()) };
        let mut extra = [0 as c_char; EXTRA_LENGTH];
        // SAFETY: `xen_extraversion_t` has 16 bytes.
        let rc = unsafe { (self.functions.version)(self.xch, VERSION_EXTRA, extra.as_mut_ptr().cast()) };
        if number < 0 || rc < 0 {
            return Err(XenError::HostCall { call: "xc_version", cause: io::Error::last_os_error().to_string() });
        }
        let text: Vec<u8> = extra.iter().map(|byte| byte.cast_unsigned()).take_while(|byte| *byte != 0).collect();
        let number = number.unsigned_abs();
        Ok((number >> 16, number & 0xffff, String::from_utf8_lossy(&text).into_owned()))
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // SAFETY: opened by us, closed once.
        unsafe { (self.functions.close)(self.xch) };
    }
}

/// # Safety
/// `T` must be the function's true type, and the symbol must not be used after `library` is closed.
pub(super) unsafe fn symbol<T>(library: &Library, name: &str) -> Result<Symbol<T>, XenError> {
    // SAFETY: the caller vouches for the type.
    unsafe { library.get(name.as_bytes()) }
        .map_err(|error| XenError::Library { library: name.into(), cause: error.to_string() })
}

/// `XEN_DOMINF_*` of `public/domctl.h`.
pub(super) fn state_of_flags(flags: u32) -> DomainState {
    DomainState {
        dying: flags & 1 != 0,
        paused: flags & 1 << 3 != 0,
        running: flags & 1 << 5 != 0,
        shutdown: (flags & 1 << 2 != 0).then(|| ShutdownReason::from_code((flags >> 16 & 0xff) as u8)),
    }
}

pub(super) fn failed(call: &'static str, domid: DomId, error: &io::Error) -> XenError {
    if error.raw_os_error() == Some(libc::ESRCH) {
        return XenError::NoDomain { domid };
    }
    XenError::Call { call, domid, cause: error.to_string() }
}

pub(super) fn check(call: &'static str, domid: DomId, rc: c_int) -> Result<(), XenError> {
    if rc < 0 {
        return Err(failed(call, domid, &io::Error::last_os_error()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_flags() {
        let state = state_of_flags(1 << 1 | 1 << 2 | 2 << 16 | 1 << 8);
        assert!(state.is_suspended() && !state.paused && !state.running);
        assert_eq!(state_of_flags(1 << 5).shutdown, None);
        assert!(state_of_flags(1 | 1 << 2 | 3 << 16).dying);
        assert_eq!(state_of_flags(1 << 2 | 3 << 16).shutdown, Some(ShutdownReason::Crash));
    }

    #[test]
    fn the_libraries_here_have_every_symbol() {
        // Without a hypervisor the open fails, but only after all symbols were found.
        match Control::open() {
            Ok(_) | Err(XenError::Open { .. }) => {}
            Err(other) => panic!("{other}"),
        }
    }
}
