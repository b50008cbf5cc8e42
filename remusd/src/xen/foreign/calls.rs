//! The library functions that reading a guest's memory and state takes, bound by soname (signatures: Xen 4.16 to 4.20).
#![allow(unsafe_code)]

use std::ffi::{c_int, c_longlong, c_uint, c_ulong, c_void};
use std::io;
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;

use libloading::os::unix::{Library, Symbol};

use super::super::ffi::{Xch, check, failed, symbol};
use super::super::hypervisor::XenError;
use super::super::soname;
use super::windows::{Mapping, WINDOW};
use crate::ids::DomId;

const CLEAN: c_uint = 11;
/// `XEN_DOMCTL_SHADOW_LOGDIRTY_FINAL`: what the hypervisor has mapped writable counts as dirty too.
const FINAL: c_uint = 1;
const PAGE: usize = 4096;
/// `XEN_DOMCTL_PFINFO_*`: the type of a page in bits 31:28; from 0xd on it has no contents.
const TYPE_SHIFT: u32 = 28;
const FIRST_WITHOUT_CONTENTS: u64 = 0xd;
/// `xen_cpuid_leaf_t` and `xen_msr_entry_t` of `public/arch-x86/xen.h`.
const LEAF: usize = 24;
const MSR: usize = 16;

/// `struct xc_hypercall_buffer` of xenctrl.h.
#[repr(C)]
struct HypercallBuffer {
    hbuf: *mut c_void,
    shadow: *mut HypercallBuffer,
    direction: c_int,
    ubuf: *mut c_void,
    size: usize,
}

#[repr(C)]
#[derive(Default)]
struct ShadowStats {
    faults: u32,
    dirty: u32,
}

type LogDirtyControl =
    unsafe extern "C" fn(Xch, u32, c_uint, *mut HypercallBuffer, c_ulong, c_uint, *mut ShadowStats) -> c_longlong;
type TscInfo = unsafe extern "C" fn(Xch, u32, *mut u32, *mut u64, *mut u32, *mut u32) -> c_int;
type Serialise = unsafe extern "C" fn(Xch, *const c_void, *mut c_void, *mut u32, *mut c_void, *mut u32) -> c_int;

/// Calls on an interface that belongs to somebody else; for its thread.
pub(super) struct Calls {
    maximum_gpfn: Symbol<unsafe extern "C" fn(Xch, u32, *mut u64) -> c_int>,
    types: Symbol<unsafe extern "C" fn(Xch, u32, c_uint, *mut u64) -> c_int>,
    log_dirty: Symbol<LogDirtyControl>,
    alloc: Symbol<unsafe extern "C" fn(Xch, *mut HypercallBuffer, c_int) -> *mut c_void>,
    free: Symbol<unsafe extern "C" fn(Xch, *mut HypercallBuffer, c_int)>,
    tsc: Symbol<TscInfo>,
    policy_size: Symbol<unsafe extern "C" fn(Xch, *mut u32, *mut u32) -> c_int>,
    policy_new: Symbol<unsafe extern "C" fn() -> *mut c_void>,
    policy_of_domain: Symbol<unsafe extern "C" fn(Xch, u32, *mut c_void) -> c_int>,
    policy_serialise: Symbol<Serialise>,
    policy_free: Symbol<unsafe extern "C" fn(*mut c_void)>,
    // After the symbols that live in them.
    _guest: Library,
    _control: Library,
}

/// A domain's TSC as the stream's record has it.
pub(super) struct Tsc {
    pub(super) mode: u32,
    pub(super) khz: u32,
    pub(super) nsec: u64,
    pub(super) incarnation: u32,
}

impl Calls {
    pub(super) fn open() -> Result<Self, XenError> {
        let control = soname::versioned("libxenctrl")?;
        let guest = soname::versioned("libxenguest")?;
        // SAFETY: each type is the function's prototype in xenctrl.h or xenguest.h of 4.17.
        unsafe {
            Ok(Self {
                maximum_gpfn: symbol(&control, "xc_domain_maximum_gpfn")?,
                types: symbol(&control, "xc_get_pfn_type_batch")?,
                log_dirty: symbol(&control, "xc_logdirty_control")?,
                alloc: symbol(&control, "xc__hypercall_buffer_alloc_pages")?,
                free: symbol(&control, "xc__hypercall_buffer_free_pages")?,
                tsc: symbol(&control, "xc_domain_get_tsc_info")?,
                policy_size: symbol(&guest, "xc_cpu_policy_get_size")?,
                policy_new: symbol(&guest, "xc_cpu_policy_init")?,
                policy_of_domain: symbol(&guest, "xc_cpu_policy_get_domain")?,
                policy_serialise: symbol(&guest, "xc_cpu_policy_serialise")?,
                policy_free: symbol(&guest, "xc_cpu_policy_destroy")?,
                _guest: guest,
                _control: control,
            })
        }
    }

    /// One more than the highest page number.
    ///
    /// # Safety
    /// Here and below: `xch` must be an open interface of this thread.
    pub(super) unsafe fn gfns(&self, xch: Xch, domid: DomId) -> Result<u64, XenError> {
        let mut highest = 0;
        // SAFETY: the number is ours and outlives the call.
        let rc = unsafe { (self.maximum_gpfn)(xch, domid.0, &raw mut highest) };
        check("xc_domain_maximum_gpfn", domid, rc)?;
        Ok(highest + 1)
    }

    /// Replaces each page number (at most 1024 of them) by whether the page has contents.
    pub(super) unsafe fn with_contents(&self, xch: Xch, domid: DomId, pages: &mut [u64]) -> Result<(), XenError> {
        // SAFETY: the numbers are ours and outlive the call, which writes as many as it reads.
        let rc = unsafe { (self.types)(xch, domid.0, pages.len() as c_uint, pages.as_mut_ptr()) };
        check("xc_get_pfn_type_batch", domid, rc)?;
        for page in pages {
            *page = u64::from(*page >> TYPE_SHIFT & 0xf < FIRST_WITHOUT_CONTENTS);
        }
        Ok(())
    }

    pub(super) unsafe fn tsc(&self, xch: Xch, domid: DomId) -> Result<Tsc, XenError> {
        let mut tsc = Tsc { mode: 0, khz: 0, nsec: 0, incarnation: 0 };
        // SAFETY: all four are ours and outlive the call.
        let rc = unsafe {
            (self.tsc)(xch, domid.0, &raw mut tsc.mode, &raw mut tsc.nsec, &raw mut tsc.khz, &raw mut tsc.incarnation)
        };
        check("xc_domain_get_tsc_info", domid, rc)?;
        Ok(tsc)
    }

    /// The domain's CPUID leaves and MSRs as the stream's records have them.
    pub(super) unsafe fn policies(&self, xch: Xch, domid: DomId) -> Result<(Vec<u8>, Vec<u8>), XenError> {
        let (mut leaves, mut msrs) = (0, 0);
        // SAFETY: both numbers are ours and outlive the call.
        check("xc_cpu_policy_get_size", domid, unsafe { (self.policy_size)(xch, &raw mut leaves, &raw mut msrs) })?;
        let mut cpuid = vec![0u64; leaves as usize * LEAF / 8];
        let mut msr = vec![0u64; msrs as usize * MSR / 8];
        // SAFETY: takes nothing.
        let Some(policy) = NonNull::new(unsafe { (self.policy_new)() }) else {
            return Err(failed("xc_cpu_policy_init", domid, &io::Error::last_os_error()));
        };
        // SAFETY: a policy object of the library's own making.
        let got = unsafe { (self.policy_of_domain)(xch, domid.0, policy.as_ptr()) };
        let got = check("xc_cpu_policy_get_domain", domid, got).and_then(|()| {
            let (cpuid, msr) = (cpuid.as_mut_ptr().cast(), msr.as_mut_ptr().cast());
            // SAFETY: both arrays have as many elements as their counts say; the counts are set to those used.
            let rc =
                unsafe { (self.policy_serialise)(xch, policy.as_ptr(), cpuid, &raw mut leaves, msr, &raw mut msrs) };
            check("xc_cpu_policy_serialise", domid, rc)
        });
        // SAFETY: made above, freed once.
        unsafe { (self.policy_free)(policy.as_ptr()) };
        got?;
        let bytes = |words: &[u64], length: usize| -> Vec<u8> {
            words.iter().flat_map(|word| word.to_ne_bytes()).take(length).collect()
        };
        Ok((bytes(&cpuid, leaves as usize * LEAF), bytes(&msr, msrs as usize * MSR)))
    }
}

/// Memory that the hypervisor can write a log of dirty pages to.
pub(super) struct LogBuffer {
    buffer: HypercallBuffer,
    pages: c_int,
    bits: u64,
}

impl LogBuffer {
    /// For `bits` pages of the guest. Give it back with [`free`](Self::free).
    pub(super) unsafe fn new(calls: &Calls, xch: Xch, bits: u64) -> Result<Self, XenError> {
        let pages = c_int::try_from(bits.div_ceil(8).div_ceil(PAGE as u64)).unwrap_or(c_int::MAX);
        // As DECLARE_HYPERCALL_BUFFER makes it: no bouncing.
        let mut buffer = HypercallBuffer {
            hbuf: null_mut(),
            shadow: null_mut(),
            direction: 0,
            ubuf: std::ptr::without_provenance_mut(usize::MAX),
            size: 0,
        };
        // SAFETY: the caller vouches for the interface; the structure is ours.
        let memory = unsafe { (calls.alloc)(xch, &raw mut buffer, pages) };
        if memory.is_null() {
            return Err(XenError::HostCall {
                call: "xc__hypercall_buffer_alloc_pages",
                cause: io::Error::last_os_error().to_string(),
            });
        }
        Ok(Self { buffer, pages, bits })
    }

    pub(super) unsafe fn free(&mut self, calls: &Calls, xch: Xch) {
        // SAFETY: allocated by the same interface; a second time frees null, which the library ignores.
        unsafe { (calls.free)(xch, &raw mut self.buffer, self.pages) };
        self.buffer.hbuf = null_mut();
    }

    /// Reads and clears the log; a bit for each page.
    pub(super) unsafe fn read(
        &mut self,
        calls: &Calls,
        xch: Xch,
        domid: DomId,
        last: bool,
    ) -> Result<&[u64], XenError> {
        let mut stats = ShadowStats::default();
        let mode = if last { FINAL } else { 0 };
        let pages = self.bits as c_ulong;
        // SAFETY: the buffer has a bit for each of the pages.
        let done = unsafe { (calls.log_dirty)(xch, domid.0, CLEAN, &raw mut self.buffer, pages, mode, &raw mut stats) };
        if done < 0 || done.unsigned_abs() != self.bits {
            let error = if done < 0 {
                io::Error::last_os_error()
            } else {
                io::Error::other(format!("{done} pages of {}", self.bits))
            };
            return Err(failed("xc_logdirty_control(CLEAN)", domid, &error));
        }
        // SAFETY: the memory has whole pages, at least `bits` bits; nobody writes to it while the slice lives, as this is borrowed.
        Ok(unsafe { std::slice::from_raw_parts(self.buffer.hbuf.cast::<u64>(), self.bits.div_ceil(64) as usize) })
    }
}

/// The handle that maps other domains' memory. Mappings keep it open.
pub(super) struct Mapper {
    handle: NonNull<c_void>,
    map: Symbol<unsafe extern "C" fn(*mut c_void, u32, c_int, usize, *const u64, *mut c_int) -> *mut c_void>,
    unmap: Symbol<unsafe extern "C" fn(*mut c_void, *mut c_void, usize) -> c_int>,
    close: Symbol<unsafe extern "C" fn(*mut c_void) -> c_int>,
    _library: Library,
}

// SAFETY: the handle is a file descriptor and a cache for closed ones guarded by nothing that mapping or unmapping touches; the calls
// are ioctl, mmap and munmap, which any thread may do.
unsafe impl Send for Mapper {}
// SAFETY: as above.
unsafe impl Sync for Mapper {}

impl Mapper {
    pub(super) fn open() -> Result<Arc<Self>, XenError> {
        let library = soname::stable("libxenforeignmemory.so.1")?;
        // SAFETY: the types are the prototypes in xenforeignmemory.h, a stable interface.
        let (open, map, unmap, close) = unsafe {
            let open: Symbol<unsafe extern "C" fn(*mut c_void, c_uint) -> *mut c_void> =
                symbol(&library, "xenforeignmemory_open")?;
            let unmap = symbol(&library, "xenforeignmemory_unmap")?;
            (open, symbol(&library, "xenforeignmemory_map")?, unmap, symbol(&library, "xenforeignmemory_close")?)
        };
        // SAFETY: a null logger is allowed: the library then logs to stderr.
        let Some(handle) = NonNull::new(unsafe { open(null_mut(), 0) }) else {
            return Err(XenError::Open { cause: io::Error::last_os_error().to_string() });
        };
        Ok(Arc::new(Self { handle, map, unmap, close, _library: library }))
    }

    /// Maps [`WINDOW`] pages from `first` on for reading; returns the window and a bit for each page that could be mapped.
    pub(super) fn window(
        self: &Arc<Self>,
        domid: DomId,
        first: u64,
    ) -> Result<(Box<dyn Mapping>, [u64; WINDOW / 64]), XenError> {
        let gfns: [u64; WINDOW] = std::array::from_fn(|index| first + index as u64);
        let mut errors = [0; WINDOW];
        // SAFETY: both arrays have as many elements as pages are asked for.
        let address = unsafe {
            (self.map)(self.handle.as_ptr(), domid.0, libc::PROT_READ, WINDOW, gfns.as_ptr(), errors.as_mut_ptr())
        };
        let Some(start) = NonNull::new(address) else {
            return Err(failed("xenforeignmemory_map", domid, &io::Error::last_os_error()));
        };
        let mut mapped = [0; WINDOW / 64];
        for (page, _) in errors.iter().enumerate().filter(|(_, error)| **error == 0) {
            mapped[page / 64] |= 1 << (page % 64);
        }
        Ok((Box::new(ForeignWindow { start, mapper: Arc::clone(self) }), mapped))
    }
}

impl Drop for Mapper {
    fn drop(&mut self) {
        // SAFETY: opened by us, closed once; all mappings are gone, as they hold this.
        unsafe { (self.close)(self.handle.as_ptr()) };
    }
}

struct ForeignWindow {
    start: NonNull<c_void>,
    mapper: Arc<Mapper>,
}

// SAFETY: an address of mapped memory is the same for all threads.
unsafe impl Send for ForeignWindow {}
// SAFETY: as above; it is only read.
unsafe impl Sync for ForeignWindow {}

impl Mapping for ForeignWindow {
    fn start(&self) -> NonNull<u8> {
        self.start.cast()
    }
}

impl Drop for ForeignWindow {
    fn drop(&mut self) {
        // SAFETY: mapped by us with this size, unmapped once.
        unsafe { (self.mapper.unmap)(self.mapper.handle.as_ptr(), self.start.as_ptr(), WINDOW) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_libraries_here_have_every_symbol() {
        assert!(Calls::open().is_ok());
        // Without a hypervisor the open fails, but only after all symbols were found.
        match Mapper::open() {
            Ok(_) | Err(XenError::Open { .. }) => {}
            Err(other) => panic!("{other}"),
        }
    }
}
