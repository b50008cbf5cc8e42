//! The thread that talks to the kernel for all buffered interfaces of one protection.
//!
//! Sending a request blocks while another process holds the RTNL lock, and no timer interrupts that. So it is
//! done on a thread of its own, and only those who wait for the answer keep time.
//!
//! The same thread reads the kernel's notifications, all of them before each request: a reset that was complete
//! before a release began is known and repaired before it.

use std::collections::HashMap;
use std::io;
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};
use rtnetlink::sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket, protocols::NETLINK_ROUTE};
use tokio::sync::{mpsc, oneshot};

use super::conn::Conn;
use super::error::NetError;
use super::event::NetEvent;
use super::lane::Lane;
use super::watch::notice;
use super::wire::messages;
use crate::output::OutputTeller;

/// `RTNLGRP_LINK` and `RTNLGRP_TC` of `linux/rtnetlink.h`.
const GROUPS: [u32; 2] = [1, 4];
/// Room for notifications, in bytes: a burst of a few thousand.
const ROOM: usize = 4 << 20;
/// How often queues are looked at for lost packets while no epoch does it: the kernel has no event for those.
const LOOK: Duration = Duration::from_secs(1);

type Job = Box<dyn FnOnce(&mut Worker) + Send>;

/// What the thread has.
pub(super) struct Worker {
    pub conn: Conn,
    /// By the name of the guest's interface.
    pub lanes: HashMap<String, Lane>,
    monitor: TokioSocket,
    events: mpsc::Sender<NetEvent>,
    /// Told whenever a guest sends something that is held.
    pub output: Option<OutputTeller>,
}

/// A way to have things done by the thread. It ends when the last one is dropped.
#[derive(Clone)]
pub(super) struct WorkerHandle {
    jobs: mpsc::UnboundedSender<Job>,
}

impl WorkerHandle {
    /// Starts the thread, in the network namespace of the calling one.
    pub(super) fn start(events: mpsc::Sender<NetEvent>, output: Option<OutputTeller>) -> Result<Self, NetError> {
        let (jobs, inbox) = mpsc::unbounded_channel();
        let conn = Conn::open()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let monitor = {
            let _registered_there = runtime.enter();
            open_monitor()?
        };
        std::thread::Builder::new().name("netbuffer".into()).spawn(move || {
            let worker = Worker { conn, lanes: HashMap::new(), monitor, events, output };
            runtime.block_on(worker.run(inbox));
        })?;
        Ok(Self { jobs })
    }

    /// Has `work` done, after all notifications that are there. Nothing is started any more once `within` is
    /// over; what is under way then still ends, unseen.
    pub(super) async fn call<T: Send + 'static>(
        &self,
        doing: &'static str,
        within: Duration,
        work: impl FnOnce(&mut Worker) -> Result<T, NetError> + Send + 'static,
    ) -> Result<T, NetError> {
        let late = move || NetError::Timeout { doing, ms: within.as_millis() };
        let deadline = Instant::now() + within;
        let (answer, answered) = oneshot::channel();
        let job = move |worker: &mut Worker| {
            let result = if Instant::now() >= deadline { Err(late()) } else { work(worker) };
            // The caller may have given up waiting.
            let _ = answer.send(result);
        };
        self.jobs.send(Box::new(job)).map_err(|_| NetError::NoWorker)?;
        match tokio::time::timeout(within, answered).await {
            Ok(result) => result.unwrap_or(Err(NetError::NoWorker)),
            Err(_) => Err(late()),
        }
    }
}

fn open_monitor() -> io::Result<TokioSocket> {
    let mut monitor = TokioSocket::new(NETLINK_ROUTE)?;
    let socket = monitor.socket_mut();
    socket.bind(&SocketAddr::new(0, 0))?;
    // Without the privilege to exceed the system's maximum, what that allows has to do.
    if let Err(error) = setsockopt(socket, sockopt::RcvBufForce, &ROOM) {
        tracing::debug!(%error, "no larger receive buffer for notifications");
    }
    for group in GROUPS {
        socket.add_membership(group)?;
    }
    Ok(monitor)
}

impl Worker {
    async fn run(mut self, mut inbox: mpsc::UnboundedReceiver<Job>) {
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                job = inbox.recv() => match job {
                    Some(job) => {
                        self.read_notices();
                        job(&mut self);
                    }
                    None => return,
                },
                datagram = self.monitor.recv_from_full() => {
                    if self.datagram(datagram) {
                        self.read_notices();
                    } else {
                        tracing::error!("cannot watch network queues any more");
                        return;
                    }
                }
                _ = look.tick() => self.look_at_all(),
            }
        }
    }

    /// Reads and acts on every notification that is there.
    pub(super) fn read_notices(&mut self) {
        while {
            let datagram = self.monitor.socket_ref().recv_from_full();
            self.datagram(datagram)
        } {}
    }

    /// Acts on what was read. Returns whether there may be more.
    fn datagram(&mut self, datagram: io::Result<(Vec<u8>, SocketAddr)>) -> bool {
        let error = match datagram {
            Ok((datagram, _)) => {
                let port = self.conn.port();
                for notice in messages(&datagram).iter().filter_map(|raw| notice(raw, port)) {
                    for lane in self.lanes.values_mut() {
                        if let Some(event) = lane.notice(&mut self.conn, &notice) {
                            tell(&self.events, event);
                        }
                    }
                }
                return true;
            }
            Err(error) => error,
        };
        match error.kind() {
            io::ErrorKind::WouldBlock => return false,
            io::ErrorKind::Interrupted => return true,
            _ => {}
        }
        tracing::warn!(%error, "notifications of the kernel were lost");
        for lane in self.lanes.values_mut() {
            for event in lane.notices_lost(&mut self.conn) {
                tell(&self.events, event);
            }
        }
        error.raw_os_error() == Some(libc::ENOBUFS)
    }

    fn look_at_all(&mut self) {
        for lane in self.lanes.values_mut().filter(|lane| lane.is_armed()) {
            if let Some(event) = lane.look(&mut self.conn) {
                tell(&self.events, event);
            }
        }
    }

    /// The lane of an interface, together with what is needed to use it.
    pub(super) fn lane(&mut self, vif: &str) -> Result<(&mut Lane, &mut Conn), NetError> {
        match self.lanes.get_mut(vif) {
            Some(lane) => Ok((lane, &mut self.conn)),
            None => Err(NetError::NotSetUp(vif.to_owned())),
        }
    }

    /// Looks at one lane's queue.
    pub(super) fn look_at(&mut self, vif: &str) {
        if let Some(lane) = self.lanes.get_mut(vif)
            && let Some(event) = lane.look(&mut self.conn)
        {
            tell(&self.events, event);
        }
    }
}

/// Never waits: a slow listener must not hold up an epoch. What it misses is in the log.
fn tell(events: &mpsc::Sender<NetEvent>, event: NetEvent) {
    tracing::warn!(?event, "network queue");
    if let Err(error) = events.try_send(event) {
        tracing::error!(%error, "a network event could not be delivered");
    }
}
