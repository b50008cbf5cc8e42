//! libxenforeignmemory (a stable ABI), and what of libxenctrl tells which pages may be compared.
#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::ffi::{c_int, c_uint, c_ulong, c_void};
use std::io;

use libloading::os::unix::{Library, Symbol};

use super::{PageHash, hash};
use crate::ids::DomId;
use crate::stream::item::{PAGE_SIZE, PageBatch};
use crate::xen::ffi::{failed, symbol};
use crate::xen::hypervisor::XenError;
use crate::xen::soname;

type Handle = *mut c_void;

/// `XENMEM_resource_grant_table` and its id `_shared` (`public/memory.h`).
const RESOURCE_GRANT_TABLE: c_uint = 1;
const RESOURCE_SHARED: c_uint = 0;
/// `XEN_DOMCTL_PFINFO_NOTAB` (`public/domctl.h`): the only type of a PVH or HVM guest's RAM. Xen's own pages have XTAB.
const NOTAB: u64 = 0;

/// `struct gnttab_query_size` (`public/grant_table.h`).
#[repr(C)]
struct QuerySize {
    dom: u16,
    nr_frames: u32,
    max_nr_frames: u32,
    status: i16,
}

struct Functions {
    close: Symbol<unsafe extern "C" fn(Handle) -> c_int>,
    map: Symbol<unsafe extern "C" fn(Handle, u32, c_int, usize, *const u64, *mut c_int) -> *mut c_void>,
    unmap: Symbol<unsafe extern "C" fn(Handle, *mut c_void, usize) -> c_int>,
    #[allow(clippy::type_complexity, reason = "the prototype")]
    map_resource: Symbol<
        unsafe extern "C" fn(
            Handle,
            u16,
            c_uint,
            c_uint,
            c_ulong,
            c_ulong,
            *mut *mut c_void,
            c_int,
            c_int,
        ) -> *mut c_void,
    >,
    unmap_resource: Symbol<unsafe extern "C" fn(Handle, *mut c_void) -> c_int>,
    xc_close: Symbol<unsafe extern "C" fn(Handle) -> c_int>,
    types: Symbol<unsafe extern "C" fn(Handle, u32, c_uint, *mut u64) -> c_int>,
    maximum: Symbol<unsafe extern "C" fn(Handle, u32, *mut u64) -> c_int>,
    grant_size: Symbol<unsafe extern "C" fn(Handle, *mut QuerySize) -> c_int>,
    grant_version: Symbol<unsafe extern "C" fn(Handle, u32) -> c_int>,
}

/// Both interfaces, for one thread.
pub(super) struct Pages {
    memory: Handle,
    control: Handle,
    functions: Functions,
    // After the symbols that live in them.
    _memory: Library,
    _control: Library,
}

impl Pages {
    pub(super) fn open() -> Result<Self, XenError> {
        let memory_so = soname::stable("libxenforeignmemory.so.1")?;
        let control_so = soname::versioned("libxenctrl")?;
        // SAFETY: each type is the function's prototype in xenforeignmemory.h (soname 1) or xenctrl.h of 4.17.
        let (open, xc_open, functions) = unsafe {
            let open: Symbol<unsafe extern "C" fn(*mut c_void, c_uint) -> Handle> =
                symbol(&memory_so, "xenforeignmemory_open")?;
            let xc_open: Symbol<unsafe extern "C" fn(*mut c_void, *mut c_void, c_uint) -> Handle> =
                symbol(&control_so, "xc_interface_open")?;
            let functions = Functions {
                close: symbol(&memory_so, "xenforeignmemory_close")?,
                map: symbol(&memory_so, "xenforeignmemory_map")?,
                unmap: symbol(&memory_so, "xenforeignmemory_unmap")?,
                map_resource: symbol(&memory_so, "xenforeignmemory_map_resource")?,
                unmap_resource: symbol(&memory_so, "xenforeignmemory_unmap_resource")?,
                xc_close: symbol(&control_so, "xc_interface_close")?,
                types: symbol(&control_so, "xc_get_pfn_type_batch")?,
                maximum: symbol(&control_so, "xc_domain_maximum_gpfn")?,
                grant_size: symbol(&control_so, "xc_gnttab_query_size")?,
                grant_version: symbol(&control_so, "xc_gnttab_get_version")?,
            };
            (open, xc_open, functions)
        };
        // SAFETY: null loggers are allowed: the libraries then log to stderr.
        let (memory, control) =
            unsafe { (open(std::ptr::null_mut(), 0), xc_open(std::ptr::null_mut(), std::ptr::null_mut(), 0)) };
        let error = XenError::Open { cause: io::Error::last_os_error().to_string() };
        if memory.is_null() || control.is_null() {
            // SAFETY: what was opened is closed once.
            unsafe {
                if !memory.is_null() {
                    (functions.close)(memory);
                }
                if !control.is_null() {
                    (functions.xc_close)(control);
                }
            }
            return Err(error);
        }
        Ok(Self { memory, control, functions, _memory: memory_so, _control: control_so })
    }

    /// See [`super::GuestPages::hashes`].
    pub(super) fn hashes(&self, domid: DomId, gfns: &[u64]) -> Result<Vec<Option<PageHash>>, XenError> {
        if gfns.is_empty() {
            return Ok(Vec::new());
        }
        let types = self.types(domid, gfns)?;
        let granted = self.granted(domid)?;
        let mut errors = vec![0; gfns.len()];
        // SAFETY: `gfns` and `errors` have as many elements as is said.
        let mapped = unsafe {
            (self.functions.map)(self.memory, domid.0, libc::PROT_READ, gfns.len(), gfns.as_ptr(), errors.as_mut_ptr())
        };
        if mapped.is_null() {
            return Err(failed("xenforeignmemory_map", domid, &io::Error::last_os_error()));
        }
        let mut hashes = Vec::with_capacity(gfns.len());
        for (index, gfn) in gfns.iter().enumerate() {
            let plain = types[index] == NOTAB && errors[index] == 0 && !granted.contains(gfn);
            hashes.push(plain.then(|| {
                let mut page = [0; PAGE_SIZE];
                // SAFETY: this page of the mapping is there (no error). It may be written to meanwhile by a guest that runs, so it
                // is copied as bytes and never referred to.
                unsafe {
                    let from = mapped.cast::<u8>().add(index * PAGE_SIZE);
                    std::ptr::copy_nonoverlapping(from, page.as_mut_ptr(), PAGE_SIZE);
                }
                hash(&page)
            }));
        }
        // SAFETY: mapped above with as many pages.
        unsafe { (self.functions.unmap)(self.memory, mapped, gfns.len()) };
        Ok(hashes)
    }

    /// See [`super::GuestPages::read`].
    pub(super) fn read(&self, domid: DomId, gfns: &[u64]) -> Result<PageBatch, XenError> {
        if gfns.is_empty() {
            return Ok(PageBatch::default());
        }
        let types = self.types(domid, gfns)?;
        let there = gfns.iter().zip(types).filter(|(_, kind)| *kind == NOTAB);
        let entries: Vec<u64> = there.map(|(gfn, _)| *gfn).collect();
        if entries.is_empty() {
            return Ok(PageBatch::default());
        }
        let mut errors = vec![0; entries.len()];
        // SAFETY: `entries` and `errors` have as many elements as is said.
        let mapped = unsafe {
            (self.functions.map)(
                self.memory,
                domid.0,
                libc::PROT_READ,
                entries.len(),
                entries.as_ptr(),
                errors.as_mut_ptr(),
            )
        };
        if mapped.is_null() {
            return Err(failed("xenforeignmemory_map", domid, &io::Error::last_os_error()));
        }
        let size = entries.len() * PAGE_SIZE;
        let refused = errors.iter().position(|error| *error != 0);
        let data = match refused {
            None => {
                let mut data = vec![0; size];
                // SAFETY: every page of the mapping is there (no error). Somebody may write to it meanwhile, so it is copied as bytes.
                unsafe { std::ptr::copy_nonoverlapping(mapped.cast::<u8>(), data.as_mut_ptr(), size) };
                data
            }
            Some(_) => Vec::new(),
        };
        // SAFETY: mapped above with as many pages.
        unsafe { (self.functions.unmap)(self.memory, mapped, entries.len()) };
        match refused {
            Some(index) => {
                let error = io::Error::from_raw_os_error(errors[index].abs());
                Err(failed("xenforeignmemory_map", domid, &error))
            }
            None => Ok(PageBatch { entries, data: data.into() }),
        }
    }

    /// See [`super::GuestPages::last`].
    pub(super) fn last(&self, domid: DomId) -> Result<u64, XenError> {
        let mut last = 0;
        // SAFETY: an open interface, a number, and where the answer goes (`xen_pfn_t`, 64 bits on this architecture).
        let rc = unsafe { (self.functions.maximum)(self.control, domid.0, &raw mut last) };
        match rc {
            0.. => Ok(last),
            _ => Err(failed("xc_domain_maximum_gpfn", domid, &io::Error::last_os_error())),
        }
    }

    fn types(&self, domid: DomId, gfns: &[u64]) -> Result<Vec<u64>, XenError> {
        let mut types = gfns.to_vec();
        let count = c_uint::try_from(types.len())
            .map_err(|error| XenError::HostCall { call: "xc_get_pfn_type_batch", cause: error.to_string() })?;
        // SAFETY: an array of `count` page numbers, replaced by their types.
        let rc = unsafe { (self.functions.types)(self.control, domid.0, count, types.as_mut_ptr()) };
        if rc < 0 {
            return Err(failed("xc_get_pfn_type_batch", domid, &io::Error::last_os_error()));
        }
        Ok(types)
    }

    /// The pages that another domain may write to now: rings, buffers under I/O, persistent grants.
    fn granted(&self, domid: DomId) -> Result<BTreeSet<u64>, XenError> {
        let dom = u16::try_from(domid.0).map_err(|_| XenError::NoDomain { domid })?;
        let mut size = QuerySize { dom, nr_frames: 0, max_nr_frames: 0, status: 0 };
        // SAFETY: the structure is ours and outlives the call.
        let rc = unsafe { (self.functions.grant_size)(self.control, &raw mut size) };
        if rc < 0 || size.status != 0 {
            return Err(failed("xc_gnttab_query_size", domid, &io::Error::last_os_error()));
        }
        // SAFETY: an open interface and a number.
        let version = unsafe { (self.functions.grant_version)(self.control, domid.0) };
        if size.nr_frames == 0 {
            return Ok(BTreeSet::new());
        }
        let mut table = std::ptr::null_mut();
        // SAFETY: `table` is ours; null lets the library choose the address.
        let resource = unsafe {
            (self.functions.map_resource)(
                self.memory,
                dom,
                RESOURCE_GRANT_TABLE,
                RESOURCE_SHARED,
                0,
                c_ulong::from(size.nr_frames),
                &raw mut table,
                libc::PROT_READ,
                0,
            )
        };
        if resource.is_null() {
            return Err(failed("xenforeignmemory_map_resource", domid, &io::Error::last_os_error()));
        }
        let mut bytes = vec![0; size.nr_frames as usize * PAGE_SIZE];
        // SAFETY: the resource has `nr_frames` pages; both sides may write to it meanwhile, so it is copied as bytes.
        unsafe {
            std::ptr::copy_nonoverlapping(table.cast::<u8>(), bytes.as_mut_ptr(), bytes.len());
            (self.functions.unmap_resource)(self.memory, resource);
        }
        Ok(writable(&bytes, version))
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: both were opened by us and are closed once.
        unsafe {
            (self.functions.close)(self.memory);
            (self.functions.xc_close)(self.control);
        }
    }
}

/// The frames of the entries that let somebody write (`struct grant_entry_v1` and `_v2` in `public/grant_table.h`). A transitive or
/// sub-page entry of version 2 cannot be mapped, and copies are logged.
fn writable(table: &[u8], version: c_int) -> BTreeSet<u64> {
    const KIND: u16 = 3;
    const PERMIT_ACCESS: u16 = 1;
    const READ_ONLY: u16 = 1 << 2;
    let permits = |entry: &[u8]| {
        let flags = u16::from_le_bytes([entry[0], entry[1]]);
        flags & KIND == PERMIT_ACCESS && flags & READ_ONLY == 0
    };
    let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |sum: u64, byte| sum << 8 | u64::from(*byte));
    if version == 2 {
        return table.chunks_exact(16).filter(|e| permits(e)).map(|e| word(&e[8..16])).collect();
    }
    table.chunks_exact(8).filter(|e| permits(e)).map(|e| word(&e[4..8])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_libraries_here_have_every_symbol() {
        // Without a hypervisor the open fails, but only after all symbols were found.
        match Pages::open() {
            Ok(_) | Err(XenError::Open { .. }) => {}
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn only_what_others_may_write_is_left_out() {
        // Writable and in use, read-only, none, accept-transfer.
        let entries: [(u16, u32); 4] = [(1 | 1 << 3 | 1 << 4, 7), (1 | 1 << 2, 8), (0, 9), (2, 10)];
        let mut v1 = Vec::new();
        let mut v2 = Vec::new();
        for (flags, frame) in entries {
            for table in [&mut v1, &mut v2] {
                table.extend(flags.to_le_bytes());
                table.extend([0; 2]);
            }
            v1.extend(frame.to_le_bytes());
            v2.extend([0; 4]);
            v2.extend((u64::from(frame) | 1 << 40).to_le_bytes());
        }
        assert_eq!(writable(&v1, 1), BTreeSet::from([7]));
        assert_eq!(writable(&v2, 2), BTreeSet::from([7 | 1 << 40]));
    }
}
