//! The disk's service as a process, and the requests that it takes: what `service/node` does.

use devices::mirror::core::intent::Intent;
use devices::mirror::core::meta::Role;
use devices::mirror::core::source::Source;
use devices::mirror::core::target::Target;

use super::storage::geometry;
use super::work::Job;
use super::{Happens, News, ROUND};
use crate::enforced::enforced;
use crate::simulate::plan::{HostIx, MS, Micros};
use crate::simulate::world::World;

/// What of a service is in `/run`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Runtime {
    open: bool,
    dials: bool,
}

/// How far a source is with its copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// There is no line.
    Alone,
    /// It has said hello.
    Greeted,
    /// The marks of both are being saved; then the copy gets the go-ahead, under this lineage if it is a new one.
    Marking(Option<u128>),
    /// The copy was given the go-ahead.
    Starting,
    /// Records flow.
    Session,
}

/// A disk that a guest may write.
pub struct SourceDuty {
    /// The real thing.
    pub source: Source,
    /// A guest is served.
    pub open: bool,
    /// It looks for its copy.
    pub dials: bool,
    /// The line to it.
    pub line: Option<usize>,
    /// How far it is.
    pub stage: Stage,
    /// When the other end was last heard.
    pub heard: Micros,
    /// The clock is set to this.
    pub wakes: Option<Micros>,
    in_sync: bool,
}

/// A copy that follows.
pub struct Follower {
    /// The real thing.
    pub target: Target,
    /// The line to its source.
    pub line: Option<usize>,
    /// What is to be said.
    pub replies: Vec<devices::mirror::core::target::Reply>,
    /// The epoch that it was made into.
    pub active: Option<u64>,
    /// It cannot follow any more.
    pub broken: bool,
    /// Whose activation is being carried out: session, epoch, and the daemon that waits.
    pub asked: Option<(u64, u64, u32)>,
}

impl Follower {
    fn is_replaceable(&self) -> bool {
        !self.target.is_armed() && self.active.is_none()
    }
}

/// What the disk is here.
pub enum Duty {
    /// Nothing yet.
    None,
    /// The source.
    Source(Box<SourceDuty>),
    /// A copy, with the session that it has or had.
    Target(Option<Box<Follower>>),
}

/// A service that runs.
pub struct Service {
    /// What it is.
    pub duty: Duty,
    /// What its threads do.
    pub jobs: Vec<(u64, Job)>,
    /// What is to be sent will be.
    pub sending: bool,
    /// A source is being accepted; the disk becomes nothing else meanwhile.
    pub greeting: Option<Greeting>,
}

/// A source that is being accepted.
#[derive(Clone, Copy, Debug)]
pub struct Greeting {
    /// Over which line.
    pub line: usize,
    /// Since when.
    pub since: Micros,
    /// It was told what the copy is.
    pub welcomed: bool,
}

impl Service {
    /// Its source.
    pub fn source(&mut self) -> Option<&mut SourceDuty> {
        match &mut self.duty {
            Duty::Source(duty) => Some(duty),
            _ => None,
        }
    }

    /// The copy that it keeps.
    pub fn follower(&mut self) -> Option<&mut Follower> {
        match &mut self.duty {
            Duty::Target(follower) => follower.as_deref_mut(),
            _ => None,
        }
    }
}

impl World {
    /// A source with the marks that are on disk.
    fn source_duty(&self, host: HostIx) -> Duty {
        let Some(disks) = &self.disks else { return Duty::None };
        let storage = &disks.sides[host].storage;
        let intent = Intent::load(storage.head.log, geometry().regions(), &storage.pages);
        Duty::Source(Box::new(SourceDuty {
            source: Source::new(geometry(), intent),
            open: false,
            dials: false,
            line: None,
            stage: Stage::Alone,
            heard: self.now,
            wakes: None,
            in_sync: false,
        }))
    }

    pub(super) fn disk_service_starts(&mut self, host: HostIx) {
        let Some(role) = self.disks.as_ref().map(|disks| disks.sides[host].storage.head.role) else { return };
        let duty = match role {
            Role::None => Duty::None,
            Role::Target => Duty::Target(None),
            Role::Source => self.source_duty(host),
        };
        let Some(disks) = &mut self.disks else { return };
        let side = &mut disks.sides[host];
        if side.service.is_some() {
            return;
        }
        side.service = Some(Service { duty, jobs: Vec::new(), sending: false, greeting: None });
        let (incarnation, runtime) = (side.incarnation, side.runtime);
        self.disk_later(ROUND, Happens::Round(host, incarnation));
        // What a predecessor in this boot was doing is taken up.
        if role != Role::Source || !runtime.open {
            return;
        }
        self.note(|_| format!("host {host}: the disk's service goes on serving its guest"));
        self.cover_disk("a service is restarted under its guest");
        let _ = self.disk_open(host);
        let again = self.disks.as_mut().map(|disks| std::mem::take(&mut disks.sides[host].requests));
        for write in again.unwrap_or_default() {
            self.disk_write(host, write);
        }
        if runtime.dials {
            let _ = self.disk_connects(host);
        }
    }

    /// The process dies. What its threads were doing is done or not, each for itself.
    pub(in crate::simulate) fn disk_service_dies(&mut self, host: HostIx, power: bool) {
        let Some(service) = self.disks.as_mut().and_then(|disks| disks.sides[host].service.take()) else { return };
        for (_, job) in service.jobs {
            self.disk_job_interrupted(host, job, power);
        }
        self.lines_lose(host, power);
        let Some(disks) = &mut self.disks else { return };
        let side = &mut disks.sides[host];
        side.incarnation += 1;
        let listener = side.listener.take();
        if power {
            side.runtime = Runtime::default();
            side.requests.clear();
            side.slow_until = 0;
            let coins: u64 = self.below(u64::MAX).unwrap_or(0x5555);
            let mut at = 0;
            if let Some(disks) = &mut self.disks {
                let cached = !disks.sides[host].storage.is_flushed();
                disks.sides[host].storage.crash(|| {
                    at += 1;
                    coins >> (at % 64) & 1 == 1
                });
                if cached {
                    self.cover_disk("power is lost with writes in the cache");
                }
            }
        } else {
            self.disk_tells(host, listener, News::Disconnected);
        }
    }

    /// kill -9, and a new one after so long.
    pub(in crate::simulate) fn disk_service_killed(&mut self, host: HostIx, time: Micros) {
        if self.service(host).is_none() {
            return;
        }
        let (armed, what) = match self.service(host).map(|service| &mut service.duty) {
            Some(Duty::Source(duty)) => (duty.source.is_armed(), "the source's service is killed, armed"),
            Some(Duty::Target(Some(follower))) => (follower.target.is_armed(), "the copy's service is killed, armed"),
            _ => (false, ""),
        };
        if armed {
            self.cover_disk(what);
        }
        self.disk_service_dies(host, false);
        let incarnation = self.incarnation(host);
        self.disk_later(time, Happens::Start(host, incarnation));
    }

    /// The host boots: a disk is never opened by itself.
    pub(in crate::simulate) fn disk_host_boots(&mut self, host: HostIx) {
        self.lines_forget(host);
        let incarnation = self.incarnation(host);
        let time = self.takes(2 * MS);
        self.disk_later(time, Happens::Start(host, incarnation));
    }

    fn save_runtime(&mut self, host: HostIx) {
        let Some(disks) = &mut self.disks else { return };
        let side = &mut disks.sides[host];
        side.runtime = match side.service.as_ref().map(|service| &service.duty) {
            Some(Duty::Source(duty)) => Runtime { open: duty.open, dials: duty.dials },
            _ => Runtime::default(),
        };
    }

    /// `open` and `attach`: a guest of this host is served from now on.
    pub(super) fn disk_open(&mut self, host: HostIx) -> Result<(), String> {
        let duty = self.source(host)?;
        duty.open = true;
        self.save_runtime(host);
        Ok(())
    }

    /// `close`: nobody is served any more, and requests fail.
    pub(super) fn disk_close(&mut self, host: HostIx) -> Result<(), String> {
        self.source(host)?.open = false;
        self.save_runtime(host);
        let requests = self.disks.as_mut().map(|disks| disks.sides[host].requests.clone()).unwrap_or_default();
        for write in requests {
            self.guest_told(host, write.tag, false);
        }
        Ok(())
    }

    /// `demote`: a closed disk becomes a copy that whoever connects overwrites.
    pub(super) fn disk_demote(&mut self, host: HostIx) -> Result<(), String> {
        let service = self.service(host).ok_or("the service does not run")?;
        if service.greeting.is_some() {
            return Err("it is accepting a source".into());
        }
        match &mut service.duty {
            Duty::Target(_) => return Ok(()),
            Duty::Source(duty) => {
                if duty.open {
                    return Err("it is open".into());
                }
                let line = duty.line.take();
                duty.source.end_session(None);
                self.line_close(host, line);
            }
            Duty::None => {}
        }
        self.disk_pump(host);
        let Some(disks) = &mut self.disks else { return Ok(()) };
        disks.sides[host].storage.demote();
        if let Some(service) = &mut disks.sides[host].service {
            service.duty = Duty::Target(None);
        }
        self.save_runtime(host);
        self.judge_demoted(host);
        Ok(())
    }

    fn source(&mut self, host: HostIx) -> Result<&mut SourceDuty, String> {
        let service = self.service(host).ok_or("the service does not run")?;
        service.source().ok_or_else(|| "it is not the source".into())
    }

    /// `connect`: a session with the copy from now on, a new one in any case.
    pub(super) fn disk_connects(&mut self, host: HostIx) -> Result<(), String> {
        let duty = self.source(host)?;
        duty.dials = true;
        let line = duty.line.take();
        duty.stage = Stage::Alone;
        duty.source.end_session(None);
        self.line_close(host, line);
        self.disk_pump(host);
        self.save_runtime(host);
        let (incarnation, soon) = (self.incarnation(host), self.takes(300));
        self.disk_later(soon, Happens::Dial(host, incarnation));
        Ok(())
    }

    /// `arm`.
    pub(super) fn disk_arms(&mut self, host: HostIx) -> Result<(), String> {
        self.source(host)?.source.arm().map_err(|error| error.to_string())
    }

    /// `disarm`, of either role.
    pub(super) fn disk_disarms(&mut self, host: HostIx) -> Result<(), String> {
        match &mut self.service(host).ok_or("the service does not run")?.duty {
            Duty::Source(duty) => duty.source.disarm(),
            Duty::Target(Some(follower)) => follower.target.disarm(),
            Duty::Target(None) => {}
            Duty::None => return Err("it is neither source nor copy".into()),
        }
        self.disk_pump(host);
        Ok(())
    }

    /// `barrier`, refused in a session that is not armed.
    pub(super) fn disk_barrier(&mut self, host: HostIx, epoch: u64) -> Result<(), String> {
        let source = &mut self.source(host)?.source;
        if source.pressure().is_some() && !source.is_armed() {
            return Err("the session is not armed".into());
        }
        source.barrier(epoch).map_err(|error| error.to_string())?;
        self.disk_pump(host);
        Ok(())
    }

    fn follower(&mut self, host: HostIx) -> Result<&mut Follower, String> {
        let service = self.service(host).ok_or("the service does not run")?;
        service.follower().ok_or_else(|| "it has no copy that it follows".into())
    }

    /// `held`, asked without waiting.
    pub(in crate::simulate) fn disk_is_held(&mut self, host: HostIx, epoch: u64) -> bool {
        self.follower(host).is_ok_and(|follower| follower.target.holds(epoch))
    }

    /// `commit`.
    pub(super) fn disk_commits(&mut self, host: HostIx, epoch: u64) -> Result<(), String> {
        self.follower(host)?.target.commit(epoch).map_err(|error| error.to_string())?;
        self.disk_pump(host);
        Ok(())
    }

    /// `activate`. The answer comes when the disk is that of the epoch.
    pub(super) fn disk_activates(&mut self, host: HostIx, session: u64, epoch: u64) -> Result<(), String> {
        let incarnation = self.hosts[host].incarnation;
        if self.service(host).is_some_and(|service| service.greeting.is_some()) {
            return Err("it is accepting a source".into());
        }
        let follower = self.follower(host)?;
        let line = follower.line.take();
        follower.target.freeze();
        let cut = match follower.target.progress().newest_epoch {
            Some(newest) if !enforced("R5-cut-at-the-epoch") => newest,
            _ => epoch,
        };
        let done = follower.target.activate(cut);
        self.line_close(host, line);
        if done.is_ok() {
            self.follower(host)?.asked = Some((session, epoch, incarnation));
        }
        self.disk_pump(host);
        done.map_err(|error| error.to_string())
    }

    /// The disk is that of the epoch, and the source here.
    pub(super) fn disk_is_active(&mut self, host: HostIx) {
        let asked = self.follower(host).ok().and_then(|follower| follower.asked);
        let duty = self.source_duty(host);
        if let Some(service) = self.service(host) {
            service.duty = duty;
        }
        self.save_runtime(host);
        if let Some(disks) = &mut self.disks {
            disks.sides[host].activated = true;
        }
        if let Some((session, epoch, incarnation)) = asked {
            self.judge_activated(host, session, epoch);
            self.disk_answers(host, incarnation, session, true);
        }
    }

    /// A source is there: the old session makes room for its. `Ok(false)` while its last batches are being written.
    pub(super) fn disk_makes_room(&mut self, host: HostIx) -> Result<bool, &'static str> {
        let stays = enforced("R5-armed-copy-stays");
        let (old, ready) = match self.service(host).map(|service| &mut service.duty) {
            Some(Duty::Target(None)) => return Ok(true),
            Some(Duty::Target(Some(follower))) if follower.is_replaceable() || !stays => {
                (follower.line.take(), follower.target.is_idle() || follower.broken)
            }
            Some(Duty::Target(Some(_))) => return Err("it holds epochs of a guest"),
            _ => return Err("it is no copy"),
        };
        self.line_close(host, old);
        Ok(ready)
    }

    /// Whether the copies have just become, or ceased to be, alike.
    pub(super) fn disk_sync_changes(&mut self, host: HostIx) {
        let Some(duty) = self.service(host).and_then(Service::source) else { return };
        let now = duty.source.is_in_sync();
        if now != std::mem::replace(&mut duty.in_sync, now) && now {
            self.note(|_| format!("host {host}: the disk's copies are alike"));
            self.cover_disk("the copies are alike");
        }
    }
}
