//! Boots a domain from libxl's own JSON, which xl cannot do: for a guest that reboots under our care (hazard F24).
//!
//! Runs in a process of its own (`remusd create-domain`): libxl wants to own `SIGCHLD` and may `abort()`. Functions as declared in
//! Xen 4.17's `libxl.h`, unchanged from 4.14 to 4.22; the configuration is opaque to us, in a buffer larger than any version's.

#![allow(unsafe_code)]

use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::ptr;

use libloading::os::unix::{Library, Symbol};

use super::hypervisor::XenError;
use super::soname;
use crate::ids::DomId;

/// `sizeof(libxl_domain_config)` is some kilobytes in every version.
const CONFIG_SPACE: usize = 1 << 20;

/// `XTL_PROGRESS` of xentoollog.h: warnings and errors and the steps, not debugging.
const LEVEL_PROGRESS: c_uint = 5;

struct Api {
    // Kept loaded as long as the symbols are used.
    libraries: Vec<Library>,
}

impl Api {
    fn symbol<T>(&self, name: &str) -> Result<Symbol<T>, XenError> {
        let mut cause = String::new();
        for library in &self.libraries {
            // SAFETY: each caller gives the type that libxl.h or xentoollog.h declares for the name.
            match unsafe { library.get::<T>(name.as_bytes()) } {
                Ok(symbol) => return Ok(symbol),
                Err(error) => cause = error.to_string(),
            }
        }
        Err(XenError::Library { library: "libxenlight".into(), cause })
    }
}

fn check(call: &'static str, rc: c_int) -> Result<(), XenError> {
    if rc == 0 {
        Ok(())
    } else {
        Err(XenError::HostCall { call, cause: format!("libxl error {rc}; its words are above") })
    }
}

/// Creates and unpauses the domain of this configuration (libxl's JSON, with `c_info.domid` 0 or absent). Blocks until its devices are
/// there: seconds. libxl's words go to standard error.
///
/// # Errors
/// [`XenError::Library`] when libxl cannot be loaded, [`XenError::HostCall`] when it refuses; then no domain is left.
pub fn create_domain(json: &str) -> Result<DomId, XenError> {
    let api = Api { libraries: vec![soname::stable("libxentoollog.so.1")?, soname::versioned("libxenlight")?] };
    let json = CString::new(json).map_err(|_| XenError::HostCall {
        call: "libxl_domain_config_from_json",
        cause: "the configuration has a NUL byte".into(),
    })?;

    let create_logger: Symbol<unsafe extern "C" fn(*mut libc::FILE, c_uint, c_uint) -> *mut c_void> =
        api.symbol("xtl_createlogger_stdiostream")?;
    let ctx_alloc: Symbol<unsafe extern "C" fn(*mut *mut c_void, c_int, c_uint, *mut c_void) -> c_int> =
        api.symbol("libxl_ctx_alloc")?;
    let config_init: Symbol<unsafe extern "C" fn(*mut c_void)> = api.symbol("libxl_domain_config_init")?;
    let config_dispose: Symbol<unsafe extern "C" fn(*mut c_void)> = api.symbol("libxl_domain_config_dispose")?;
    let from_json: Symbol<unsafe extern "C" fn(*mut c_void, *mut c_void, *const c_char) -> c_int> =
        api.symbol("libxl_domain_config_from_json")?;
    let create: Symbol<
        unsafe extern "C" fn(*mut c_void, *mut c_void, *mut u32, *const c_void, *const c_void) -> c_int,
    > = api.symbol("libxl_domain_create_new")?;
    let unpause: Symbol<unsafe extern "C" fn(*mut c_void, u32, *const c_void) -> c_int> =
        api.symbol("libxl_domain_unpause")?;
    let ctx_free: Symbol<unsafe extern "C" fn(*mut c_void) -> c_int> = api.symbol("libxl_ctx_free")?;

    // u64 for an alignment that suits every member.
    let mut config = vec![0u64; CONFIG_SPACE / 8];
    let config = config.as_mut_ptr().cast::<c_void>();
    let mut ctx = ptr::null_mut();
    let mut domid = 0u32;
    // SAFETY: one thread; fd 2 is open for the process's life; every pointer is valid for its call; `config` is larger than the
    // structure and initialised before use; null `ao_how` and progress arguments mean "wait" and "no report" (libxl.h).
    unsafe {
        let stderr = libc::fdopen(2, c"w".as_ptr());
        if stderr.is_null() {
            return Err(XenError::HostCall { call: "fdopen", cause: std::io::Error::last_os_error().to_string() });
        }
        let logger = create_logger(stderr, LEVEL_PROGRESS, 0);
        check("libxl_ctx_alloc", ctx_alloc(&raw mut ctx, 0, 0, logger))?;
        config_init(config);
        let result = check("libxl_domain_config_from_json", from_json(ctx, config, json.as_ptr()))
            .and_then(|()| {
                check("libxl_domain_create_new", create(ctx, config, &raw mut domid, ptr::null(), ptr::null()))
            })
            .and_then(|()| check("libxl_domain_unpause", unpause(ctx, domid, ptr::null())));
        config_dispose(config);
        ctx_free(ctx);
        result?;
    }
    Ok(DomId(domid))
}
