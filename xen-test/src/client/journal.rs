//! What a background thread saw, for others to read and to wait on.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

struct State<T> {
    items: Vec<T>,
    /// Why nothing more will come.
    ended: Option<String>,
}

/// An append-only list shared by its writer and its readers.
pub(super) struct Journal<T>(Arc<(Mutex<State<T>>, Condvar)>);

impl<T> Clone for Journal<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> Journal<T> {
    pub(super) fn new() -> Self {
        Self(Arc::new((Mutex::new(State { items: Vec::new(), ended: None }), Condvar::new())))
    }

    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn push(&self, item: T) {
        self.state().items.push(item);
        self.0.1.notify_all();
    }

    /// Changes the items in place (an answer to an earlier request).
    pub(super) fn update(&self, f: impl FnOnce(&mut Vec<T>)) {
        f(&mut self.state().items);
        self.0.1.notify_all();
    }

    /// Nothing more will come.
    pub(super) fn end(&self, why: impl Into<String>) {
        self.state().ended.get_or_insert(why.into());
        self.0.1.notify_all();
    }

    pub(super) fn ended(&self) -> Option<String> {
        self.state().ended.clone()
    }

    /// Looks at all items.
    pub(super) fn read<R>(&self, f: impl FnOnce(&[T]) -> R) -> R {
        f(&self.state().items)
    }

    /// Waits until `f` finds something in the items; `None` at the deadline
    /// or when nothing more will come.
    pub(super) fn wait<R>(&self, deadline: Instant, mut f: impl FnMut(&[T]) -> Option<R>) -> Option<R> {
        let mut state = self.state();
        loop {
            if let Some(found) = f(&state.items) {
                return Some(found);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || state.ended.is_some() {
                return None;
            }
            state = self.0.1.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
