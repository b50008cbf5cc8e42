//! One guest as the native capture engine reads it.
#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{BufMut, Bytes, BytesMut};

use super::calls::{Calls, LogBuffer, Mapper};
use super::windows::{WINDOW, Windows};
use crate::capture::native::Source;
use crate::ids::DomId;
use crate::stream::libxc::{self, kind};
use crate::stream::{Layer, Record};
use crate::xen::ffi::Control;
use crate::xen::hypervisor::XenError;

/// The HVM parameters that libxenguest saves (`xg_sr_save_x86_hvm.c`), by number: store, ioreq, buffered ioreq, paging, monitor and
/// sharing ring pages, VM86 TSS, console page, ACPI I/O ports, viridian, identity page table, generation id, ioreq server pages and
/// their number, x87 FIP width, MCA capabilities.
const PARAMS: [u32; 16] = [1, 5, 6, 27, 28, 29, 37, 17, 19, 9, 12, 34, 32, 33, 36, 38];

/// A PVH or HVM guest. For one thread; see the module's text for what a mapping holds on to.
pub struct GuestSource {
    domid: DomId,
    calls: Calls,
    mapper: Arc<Mapper>,
    windows: Windows,
    log: Option<LogBuffer>,
    gfns: u64,
    /// The domain's page count when it was last mapped.
    held: u64,
    /// Where the slow search for pages given back goes on.
    search: usize,
    // Later than the others: their calls need it.
    control: Control,
    _claim: Claim,
}

/// Domains that are being captured. Two captures would switch log-dirty under each other, and lose pages without a word.
static CLAIMED: Mutex<BTreeSet<DomId>> = Mutex::new(BTreeSet::new());

/// The right to capture a domain, for as long as it lives.
struct Claim(DomId);

impl Claim {
    fn of(domid: DomId) -> Result<Self, XenError> {
        if CLAIMED.lock().unwrap_or_else(PoisonError::into_inner).insert(domid) {
            return Ok(Self(domid));
        }
        let cause = "an earlier capture of it has not ended yet; try again in a moment".into();
        Err(XenError::Memory { domid, cause })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        CLAIMED.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.0);
    }
}

impl GuestSource {
    /// Opens the interfaces. Blocks for some milliseconds.
    ///
    /// # Errors
    /// [`XenError`] of opening, or that the domain is not there.
    pub fn open(domid: DomId) -> Result<Self, XenError> {
        let claim = Claim::of(domid)?;
        let control = Control::open()?;
        let calls = Calls::open()?;
        let mapper = Mapper::open()?;
        // SAFETY: the interface was opened on this thread and lives as long as the source.
        let gfns = unsafe { calls.gfns(control.interface(), domid)? };
        // SAFETY: as above.
        let log = unsafe { LogBuffer::new(&calls, control.interface(), gfns)? };
        let mut source = Self {
            domid,
            calls,
            mapper,
            windows: Windows::new(),
            log: Some(log),
            gfns,
            held: 0,
            search: 0,
            control,
            _claim: claim,
        };
        source.held = source.count()?;
        Ok(source)
    }

    /// Pages that the domain holds.
    fn count(&self) -> Result<u64, XenError> {
        let domid = self.domid;
        let Some(head) = self.control.head(domid)?.filter(|head| !head.state.dying) else {
            return Err(XenError::NoDomain { domid });
        };
        if head.shared != 0 || head.paged != 0 {
            return Err(XenError::Memory {
                domid,
                cause: "some of its pages are shared with other domains or paged out; turn that off, or use the save-helper engine"
                    .into(),
            });
        }
        Ok(head.pages)
    }

    /// A bit for each page of a window that has contents.
    fn contents(&self, index: usize) -> Result<[u64; WINDOW / 64], XenError> {
        let first = (index * WINDOW) as u64;
        let mut pages: [u64; WINDOW] = std::array::from_fn(|page| first + page as u64);
        let count = (self.gfns - first).min(WINDOW as u64) as usize;
        // SAFETY: as in `open`.
        unsafe { self.calls.with_contents(self.control.interface(), self.domid, &mut pages[..count])? };
        let mut there = [0; WINDOW / 64];
        for (page, _) in pages[..count].iter().enumerate().filter(|(_, there)| **there != 0) {
            there[page / 64] |= 1 << (page % 64);
        }
        Ok(there)
    }

    fn windows_in_all(&self) -> usize {
        self.gfns.div_ceil(WINDOW as u64) as usize
    }

    fn hvm_params(&self) -> Result<Bytes, XenError> {
        let mut pairs = BytesMut::new();
        let mut count = 0;
        for param in PARAMS {
            let value = self.control.hvm_param(self.domid, param)?;
            if value != 0 {
                pairs.put_u64_le(u64::from(param));
                pairs.put_u64_le(value);
                count += 1;
            }
        }
        let mut body = BytesMut::with_capacity(8 + pairs.len());
        body.put_u32_le(count);
        body.put_u32_le(0);
        body.put_slice(&pairs);
        Ok(body.freeze())
    }
}

impl Source for GuestSource {
    fn preamble(&mut self) -> Result<Bytes, XenError> {
        let (major, minor, _) = self.control.version()?;
        // SAFETY: as in `open`.
        let (cpuid, msrs) = unsafe { self.calls.policies(self.control.interface(), self.domid)? };
        Ok(libxc::hvm_preamble(major, minor, &cpuid, &msrs))
    }

    fn log_on(&mut self) -> Result<(), XenError> {
        self.control.log_dirty_start(self.domid)
    }

    fn log_off(&mut self) -> Result<(), XenError> {
        self.control.log_dirty_off(self.domid)
    }

    fn map(&mut self) -> Result<(), XenError> {
        self.windows.clear();
        // SAFETY: as in `open`.
        let gfns = unsafe { self.calls.gfns(self.control.interface(), self.domid)? };
        if gfns > self.gfns {
            return Err(XenError::Memory {
                domid: self.domid,
                cause: "it has grown beyond the page numbers that it had at first; protect it again".into(),
            });
        }
        self.held = self.count()?;
        for index in 0..self.windows_in_all() {
            let there = self.contents(index)?;
            if there.iter().all(|word| *word == 0) {
                continue;
            }
            let (mapping, mapped) = self.mapper.window(self.domid, (index * WINDOW) as u64)?;
            if there.iter().zip(&mapped).any(|(there, mapped)| there & !mapped != 0) {
                return Err(XenError::Memory {
                    domid: self.domid,
                    cause: "a page with contents cannot be mapped; use the save-helper engine".into(),
                });
            }
            self.windows.set(index, mapping, there);
        }
        Ok(())
    }

    fn stale(&mut self) -> Result<bool, XenError> {
        Ok(self.count()? != self.held)
    }

    fn differs(&mut self) -> Result<bool, XenError> {
        for index in 0..self.windows_in_all() {
            if self.contents(index)? != self.windows.mapped(index) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn given_back(&mut self, windows: usize) -> Result<bool, XenError> {
        let mut mapped = Vec::with_capacity(WINDOW);
        for _ in 0..windows.min(self.windows.in_use()) {
            // Most page numbers of a PVH guest are a hole: only what is mapped is worth a look.
            let Some(index) = self.windows.next(self.search) else { break };
            self.search = index + 1;
            mapped.clear();
            mapped.extend(
                (index * WINDOW..(index + 1) * WINDOW).map(|gfn| gfn as u64).filter(|gfn| self.windows.has(*gfn)),
            );
            // SAFETY: as in `open`.
            unsafe { self.calls.with_contents(self.control.interface(), self.domid, &mut mapped)? };
            if mapped.contains(&0) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn dirty(&mut self, last: bool, each: &mut dyn FnMut(&[u64])) -> Result<(), XenError> {
        if let Some(log) = &mut self.log {
            // SAFETY: as in `open`.
            each(unsafe { log.read(&self.calls, self.control.interface(), self.domid, last)? });
        }
        Ok(())
    }

    fn windows(&self) -> &Windows {
        &self.windows
    }

    fn state(&mut self) -> Result<Vec<Record>, XenError> {
        // SAFETY: as in `open`.
        let tsc = unsafe { self.calls.tsc(self.control.interface(), self.domid)? };
        let mut info = BytesMut::with_capacity(24);
        info.put_u32_le(tsc.mode);
        info.put_u32_le(tsc.khz);
        info.put_u64_le(tsc.nsec);
        info.put_u32_le(tsc.incarnation);
        info.put_u32_le(0);
        let record = |kind, body| Record { layer: Layer::Libxc, kind, body };
        let context = Bytes::from(self.control.hvm_context(self.domid)?);
        Ok(vec![
            record(kind::X86_TSC_INFO, info.freeze()),
            record(kind::HVM_CONTEXT, context),
            record(kind::HVM_PARAMS, self.hvm_params()?),
        ])
    }
}

impl Drop for GuestSource {
    fn drop(&mut self) {
        if let Some(mut log) = self.log.take() {
            // SAFETY: as in `open`; freed once.
            unsafe { log.free(&self.calls, self.control.interface()) };
        }
    }
}
